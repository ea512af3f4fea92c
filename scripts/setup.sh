# Sourced by the commands of this folder: makes .venv with the project and what it needs.
#
#   setup_environment [EXTRA]    of pyproject.toml's optional dependencies
#
# PYTHON            the interpreter, 3.11 to 3.13 (default: python3)
# POCKETDIFF_TORCH  cpu (default), or cuda: whatever PyPI has, on Linux several GB of CUDA
#
# PyTorch comes first and alone, because the wheel that is picked decides between a CPU build and
# CUDA. The CPU build is taken from ../shared/wheels where that folder has one, on Linux for x86
# else from PyTorch's own index, and from PyPI everywhere else and where that cannot be reached.
# A set-up that did not come to its end is begun again.

_cpu_index=https://download.pytorch.org/whl/cpu

setup_environment() {
    local extra="${1:-}" python="${PYTHON:-python3}" build="${POCKETDIFF_TORCH:-cpu}" record log
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
        echo "$("$python" --version 2>&1) is not supported; set PYTHON to a Python 3.11 to 3.13" >&2
        return 2
    fi
    if [ "$build" != cpu ] && [ "$build" != cuda ]; then
        echo "POCKETDIFF_TORCH is '$build'; set it to cpu or cuda" >&2
        return 2
    fi
    # .venv/.set-up has a line for each set-up that was finished: the build, what for, the extra.
    record="$build $(cksum <pyproject.toml | cut -d' ' -f1)"
    if [ ! -x .venv/bin/python ] || ! grep -qsx "$record ${extra:-base}" .venv/.set-up; then
        echo "setting up .venv (once; a minute or two)" >&2
        log="$(mktemp)"
        if ! _make_environment "$python" "$build" "$record" "$extra" >"$log" 2>&1; then
            echo "setting up .venv failed: $(tail -n 1 "$log") (all of it is in $log)" >&2
            return 2
        fi
        rm "$log"
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}

_make_environment() {
    local python="$1" build="$2" record="$3" extra="$4" earlier
    earlier="$(grep -s "^$build " .venv/.set-up)"
    if [ -z "$earlier" ] || ! .venv/bin/python -c ''; then
        _make_venv "$python" || return
    fi
    rm -f .venv/.set-up
    _install_torch "$build" && _install --editable ".${extra:+[$extra]}" || return
    { grep "^$record " <<<"$earlier"; echo "$record ${extra:-base}"; } >.venv/.set-up
}

_make_venv() {
    rm -rf .venv
    if command -v uv >/dev/null; then uv venv --quiet --python "$1" .venv; else "$1" -m venv .venv; fi
}

_install() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python .venv/bin/python "$@"
    else
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

_install_torch() {
    local torch wheels=../shared/wheels
    torch="$(grep -o 'torch==[^"]*' pyproject.toml | head -n 1)"
    if [ "$1" = cpu ] && [ -d "$wheels" ]; then
        _install --no-index --find-links "$wheels" --no-deps "$torch" && return
    fi
    if [ "$1" = cpu ] && [ "$(uname -sm)" = "Linux x86_64" ] && _reachable "$_cpu_index/torch/"; then
        _install --index-url "$_cpu_index" --no-deps "$torch" && return
    fi
    _install "$torch"
}

_reachable() {
    timeout 10 .venv/bin/python -c \
        'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1"
}
