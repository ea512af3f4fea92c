/* Preloaded into the local device's adbd: whatever it binds, it binds on loopback.
 *
 * adbd knows no option for the address it listens on. An IPv4 or IPv6 socket gets 127.0.0.1 (for
 * IPv6 in its mapped form, so that one socket is enough); a vsock, which a host of virtual machines
 * could reach, is refused. Other families (unix, netlink) pass.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;

    if (address->sa_family == AF_VSOCK) {
        errno = EADDRNOTAVAIL;
        return -1;
    }
    if (address->sa_family == AF_INET && length >= sizeof v4) {
        memcpy(&v4, address, sizeof v4);
        v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        return (int)syscall(SYS_bind, fd, &v4, sizeof v4);
    }
    if (address->sa_family == AF_INET6 && length >= sizeof v6) {
        static const unsigned char mapped[16] = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1};
        memcpy(&v6, address, sizeof v6);
        memcpy(&v6.sin6_addr, mapped, sizeof mapped);
        return (int)syscall(SYS_bind, fd, &v6, sizeof v6);
    }
    return (int)syscall(SYS_bind, fd, address, length);
}
