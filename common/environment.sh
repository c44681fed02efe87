# Sourced by quickstart.sh and runtests.sh from the project's root: finds or makes a Python environment with segbundles.
say() { printf '\n==> %s\n' "$*"; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# conda's base environment is often active without having been asked for
[[ ${CONDA_DEFAULT_ENV:-} == base ]] && unset CONDA_PREFIX
if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    python=$(command -v python) || die "the active environment has no python"
    is_recent "$python" || die "Python 3.10 or newer is needed; the active environment has $("$python" --version 2>&1)"
    say "Using the active environment, $("$python" -c 'import sys; print(sys.prefix)')"
else
    if [[ ! -x .venv/bin/python ]] || ! is_recent .venv/bin/python; then
        for found in python3 python3.13 python3.12 python3.11 python3.10; do
            is_recent "$found" && break
            found=
        done
        [[ -n $found ]] || die "Python 3.10 or newer is needed; found $(command -v python3 >/dev/null && python3 --version 2>&1 || echo none)"
        "$found" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
            die "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"
        say "Making an environment in .venv with $("$found" --version)"
        "$found" -m venv --clear .venv
    fi
    python=$PWD/.venv/bin/python
    export PATH=$PWD/.venv/bin:$PATH VIRTUAL_ENV=$PWD/.venv
fi

install_segbundles() { # install_segbundles EXTRAS: skipped when nothing changed since the last time
    local stamp pins
    stamp=$("$python" -c 'import sys; print(sys.prefix)')/.segbundles-installed
    if [[ $(cat "$stamp" 2>/dev/null) == "$1 $PWD $(cat pyproject.toml constraints.txt | cksum)" ]]; then
        return
    fi
    say "Installing segbundles and what it needs: minutes, and 2 GB of disk or more (only this time)"
    pins=$(mktemp)
    # a torch that is there stays: it may be a build for this machine's GPU
    if "$python" -c 'import torch' >/dev/null 2>&1; then
        grep -v '^torch==' constraints.txt >"$pins"
    else
        cp constraints.txt "$pins"
        # by itself first: asked for as another package's need, pip may take a larger build
        "$python" -m pip install --disable-pip-version-check -q "$(grep '^torch==' constraints.txt)" -c "$pins"
    fi
    "$python" -m pip install --disable-pip-version-check -q -c "$pins" -e ".[$1]"
    rm -f "$pins"
    echo "$1 $PWD $(cat pyproject.toml constraints.txt | cksum)" >"$stamp"
}
