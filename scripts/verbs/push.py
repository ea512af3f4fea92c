"""The verb `push`: a bundle brought to a device."""

from __future__ import annotations

from dataclasses import asdict

from quantize.sizes import format_bytes
from scripts.bundles import verified_bundle
from scripts.console import fact_table, out_console, print_json
from scripts.device_access import check_memory, connected_device, deploy_bundle
from scripts.options import AsJson, BundleFolder, Local, Serial, Via


def push(
    folder: BundleFolder,
    serial: Serial = None,
    via: Via = "auto",
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Bring a bundle to a device: only what is missing, verified there, whole or not at all."""
    from device_tests.results.plain_text import plain

    bundle = verified_bundle(folder)
    with connected_device(serial, via, local) as transport:
        memory = check_memory(transport, bundle)
        deployment = deploy_bundle(transport, bundle)
    if as_json:
        document = {"device": transport.serial, "via": transport.kind, "memory": memory}
        print_json(document | asdict(deployment))
        return
    sent, speed = "nothing, all of it was there", ""
    if deployment.bytes_sent:
        rest = ", the rest was there" if deployment.bytes_present else ""
        sent = f"{format_bytes(deployment.bytes_sent)}{rest}"
        speed = f", {format_bytes(deployment.bytes_sent / max(deployment.seconds, 1e-3))}/s"
    rows = [
        ("device", f"{plain(transport.serial)} ({transport.kind})"),
        ("bundle", deployment.bundle_id),
        ("folder", deployment.remote_folder),
        ("size", f"{format_bytes(deployment.bytes_total)} in {deployment.files} files"),
        ("sent", sent),
        ("time", f"{deployment.seconds:.1f} s{speed}, verified on the device"),
    ]
    out_console().print(fact_table(rows))
