#!/bin/sh
# Installs ngrokd for root, and removes it again:
#
#   sudo ./install.sh                        into /opt/ngrokd, commands in /usr/local/bin
#   sudo ./install.sh uninstall              services, what they left, and the program; the state stays
#   sudo ./install.sh uninstall --purge      the state as well: operator, key, certificate, addresses, configuration
#
# Everything that is installed is checked: each package against its hash in requirements/*.lock, and, where this tree is a
# release, each file of it against SHA256SUMS. PREFIX, BINDIR and PYTHON in the environment choose other places.
set -eu
cd "$(dirname "$0")"
PREFIX=${PREFIX:-/opt/ngrokd}
BINDIR=${BINDIR:-/usr/local/bin}
UNITS=/etc/systemd/system

fail() { # CODE MESSAGE...
    code=$1
    shift
    echo "error: $*" >&2
    exit "$code"
}

as_root() {
    [ "$(id -u)" = 0 ] || fail 77 "it is installed for root: sudo $0 $*"
}

# A file that was changed or added since the release was made could be anything, and would run as root.
verify() {
    [ -f SHA256SUMS ] || return 0
    if command -v sha256sum >/dev/null; then sum=sha256sum; else sum="shasum -a 256"; fi
    $sum -c SHA256SUMS >/dev/null 2>&1 || fail 1 "files of this release were changed: $sum -c SHA256SUMS"
    known=$(mktemp) && there=$(mktemp)
    sed 's/^[0-9a-f]*  //' SHA256SUMS | sort >"$known"
    find . -type f ! -path ./SHA256SUMS ! -name '*.pyc' | sort >"$there"
    added=$(comm -13 "$known" "$there" | head -n 5)
    rm -f "$known" "$there"
    [ -z "$added" ] || fail 1 "files that are no part of this release:" $added
    echo "the files of this release are as they were published"
}

find_python() {
    for python in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return 0
        fi
    done
    fail 69 "Python 3.11 or newer with venv is needed; on Debian and Ubuntu: apt-get install python3-venv"
}

need_make() {
    command -v make >/dev/null || fail 69 "make is needed; on Debian and Ubuntu: apt-get install make"
}

install() {
    as_root
    verify
    find_python
    need_make
    make -s install PREFIX="$PREFIX" BINDIR="$BINDIR" PYTHON="$python"
    echo "or at each boot: sudo ngrokd service install --now"
}

uninstall() {
    purge=$1
    as_root uninstall
    need_make
    ngrokd=$PREFIX/venv/bin/ngrokd
    state=/etc/ngrokd
    if [ -x "$ngrokd" ]; then
        state=$("$ngrokd" config get state.directory 2>/dev/null) || state=/etc/ngrokd
        for unit in "$UNITS"/*.service; do
            if head -n 1 "$unit" 2>/dev/null | grep -q '^# Made by "ngrokd service install"'; then
                "$ngrokd" service uninstall --name "$(basename "$unit" .service)"
            fi
        done
        "$ngrokd" cleanup
    fi
    make -s uninstall PREFIX="$PREFIX" BINDIR="$BINDIR"
    if [ "$purge" = yes ]; then
        operator=$(cat "$state/operator_id" 2>/dev/null) || operator=
        rm -rf "$state" /run/ngrokd
        echo "removed $state"
        [ -z "$operator" ] || echo "ngrok still knows operator $operator; delete it there: https://dashboard.ngrok.com"
    fi
}

case "${1:-install} ${2:-}" in
    "install ") install ;;
    "uninstall ") uninstall no ;;
    "uninstall --purge") uninstall yes ;;
    *) fail 2 "usage: $0 [install | uninstall [--purge]]" ;;
esac
