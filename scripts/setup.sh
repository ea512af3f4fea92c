# Sourced by scripts/demo and scripts/test: makes .venv with the project and what it needs.
# usage: setup_environment [extra]
#
# PyTorch comes first and alone, because the wheel that pip picks decides between a CPU build and
# several GB of CUDA packages; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS) choose it.
setup_environment() {
    local extra="${1:-}" python="${PYTHON:-python3}" stamp
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; then
        echo "$("$python" --version 2>&1) is not supported; set PYTHON to a Python 3.11 to 3.13" >&2
        return 2
    fi
    stamp=".venv/.set-up-${extra:-base}-$(cksum <pyproject.toml | cut -d' ' -f1)"
    if [ ! -f "$stamp" ]; then
        echo "setting up .venv (once; about a minute with a warm pip cache)" >&2
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable \
            ".${extra:+[$extra]}"
        touch "$stamp"
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}
