#!/bin/sh
# Have the servers that the tests of the durable queue talk to: tools/servers.sh
#
# Where redis-server or nats-server is missing, Debian's packages are installed (as root, or through sudo without asking for a
# password) and the script says so; no service is started. Where that cannot be, the tests that need them fail; under CI=true
# the script does.
set -eu

PATH=$PATH:/usr/sbin:/usr/local/sbin # Debian's nats-server is in /usr/sbin
POLICY=/usr/sbin/policy-rc.d

has_servers() {
    command -v redis-server >/dev/null 2>&1 && command -v redis-cli >/dev/null 2>&1 && command -v nats-server >/dev/null 2>&1
}

do_without() {
    if [ "${CI:-}" = true ]; then
        printf 'error: %s\n' "$*" >&2
        exit 1
    fi
    printf '%s; the tests that need these servers fail\n' "$*"
    exit 0
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

# 101 is how this script of the administrator's forbids Debian's packages to start their services.
forbid_services() {
    [ -e "$POLICY" ] && return
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null
    as_root chmod 755 "$POLICY"
    trap 'as_root rm -f "$POLICY"' EXIT
}

install_servers() {
    forbid_services
    as_root apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            redis-server nats-server >/dev/null
}

has_servers && exit 0
command -v apt-get >/dev/null 2>&1 || do_without "there is no redis-server or no nats-server here, and no apt-get to install them with"
[ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null ||
    do_without "there is no redis-server or no nats-server here; as root: apt-get install redis-server nats-server"
echo "installing the Debian packages redis-server and nats-server, for the tests of the durable queue"
install_servers || do_without "redis-server and nats-server could not be installed"
has_servers || do_without "redis-server and nats-server are installed, and yet there is no redis-server or no nats-server"
