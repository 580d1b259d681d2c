#!/bin/sh
# Install the real servers that the tests drive, and two tools that they use, from Debian's
# packages, where they are missing. The tests start the servers themselves, on free ports and with
# data folders of their own.
set -eu

packages=""
for pair in influxd:influxdb redis-server:redis-server rabbitmq-server:rabbitmq-server \
    victoria-metrics:victoria-metrics ip:iproute2 openssl:openssl; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || packages="$packages ${pair##*:}"
done
[ -n "$packages" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "Missing:$packages. This script installs by apt-get, which is not here." >&2
    exit 1
fi
run=""
if [ "$(id -u)" != 0 ]; then
    # -n: never stop to ask for a password in the middle of a test run.
    run="sudo -n"
fi
export DEBIAN_FRONTEND=noninteractive
$run apt-get update -qq
# shellcheck disable=SC2086 # a list of words
$run apt-get install -y -qq --no-install-recommends $packages
