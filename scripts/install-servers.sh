#!/bin/sh
# Install the real servers that the tests drive, and two tools that they use, from Debian's
# packages, where they are missing. The tests start the servers themselves, on free ports and with
# data folders of their own. Where they cannot be installed, say what that means, and fail.
set -eu

look() {
    programs=""
    packages=""
    for pair in influxd:influxdb redis-server:redis-server rabbitmq-server:rabbitmq-server \
        victoria-metrics:victoria-metrics ip:iproute2 openssl:openssl; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null && continue
        programs="$programs ${pair%%:*}"
        packages="$packages ${pair##*:}"
    done
}

install() {
    if ! command -v apt-get >/dev/null; then
        echo "This script installs by apt-get, which is not here."
        return 1
    fi
    run=""
    if [ "$(id -u)" != 0 ]; then
        # -n: never stop to ask for a password in the middle of a test run.
        run="sudo -n"
    fi
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 # a list of words
    $run apt-get update -qq && $run apt-get install -y -qq --no-install-recommends $packages
}

look
[ -n "$packages" ] || exit 0
if ! install; then
    look
    echo "Not installed:$programs. Tests that need them are skipped; with CI=true they fail."
    echo "To install them: sh scripts/install-servers.sh (Debian, Ubuntu; as root)"
    exit 1
fi >&2
