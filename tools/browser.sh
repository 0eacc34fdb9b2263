#!/bin/sh
# Have the browser that tests/seeing opens the timeline with: tools/browser.sh
#
# Where chromium and its driver are missing, Debian's packages are installed (as root, or through sudo without asking for a
# password) and the script says so. Where that cannot be, the tests that need them are skipped on a laptop; under CI=true
# that is an error.
set -eu

has_browser() {
    command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1
}

do_without() {
    if [ "${CI:-}" = true ]; then
        printf 'error: %s\n' "$*" >&2
        exit 1
    fi
    printf '%s; the tests that need a browser are skipped\n' "$*"
    exit 0
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

install_browser() {
    as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            chromium chromium-driver fonts-dejavu-core >/dev/null
}

has_browser && exit 0
command -v apt-get >/dev/null 2>&1 || do_without "there is no chromium with chromedriver here, and no apt-get to install them with"
[ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null ||
    do_without "there is no chromium with chromedriver here; as root: apt-get install chromium chromium-driver"
echo "installing the Debian packages chromium and chromium-driver, for the tests of the timeline's page"
install_browser || do_without "chromium and chromium-driver could not be installed"
has_browser || do_without "chromium and chromium-driver are installed, and yet there is no chromium or no chromedriver"
