#!/bin/bash
# Runs COMMAND as a unit of a systemd that was booted for it, and returns its exit status.
#
#   boot.sh UNITS SHARED COMMAND [ARGUMENT...]
#
# UNITS: a directory with units to have; SHARED: directories that are the same inside, with a colon between them. The systemd of this
# machine is PID 1 of namespaces of its own (pid, mount, uts, ipc, net, cgroup). Its root is an overlay of /, of
# which the writes go to a tmpfs. Needs root, overlayfs, cgroup2 and util-linux.
set -euo pipefail
SELF=$(readlink -f "$0")

mounts() { # in the new mount namespace: PID 1's root at $1/root
    local root=$1/root device shared
    mount -t tmpfs -o mode=755,size=1g none "$1/rw"
    mkdir "$1/rw/upper" "$1/rw/work"
    mount -t overlay -o "lowerdir=/,upperdir=$1/rw/upper,workdir=$1/rw/work" none "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    # The kernel's settings are those of the machine: nothing inside is to change them.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o nosuid,nodev,noexec,ro sysfs "$root/sys"
    mount -t cgroup2 -o nosuid,nodev,noexec none "$root/sys/fs/cgroup"
    mount -t tmpfs -o nosuid,mode=755 none "$root/dev"
    for device in null:3 zero:5 full:7 random:8 urandom:9; do
        mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"
    done
    ln -s /proc/self/fd "$root/dev/fd"
    mkdir "$root/dev/shm"
    mount -t tmpfs -o nosuid,nodev,mode=755 none "$root/run"
    mkdir -m 755 "$root/run/test"
    mount --bind "$1/io" "$root/run/test"
    IFS=: read -ra shared <<<"$2"
    for device in "${shared[@]}"; do
        mkdir -p "$root$device"
        mount --bind "$device" "$root$device"
    done

    # Nothing that this machine has enabled is started, and only what journald needs of the rest.
    mount -t tmpfs -o mode=755 none "$root/etc/systemd/system"
    mkdir -p "$root/etc/systemd/journald.conf.d"
    printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/test.conf"
    : >"$root/etc/fstab"
    cat >"$root/etc/systemd/system/test.target" <<'U'
[Unit]
Requires=systemd-journald.service
After=systemd-journald.service
Wants=test-command.service
DefaultDependencies=no
U
    cat >"$root/etc/systemd/system/test-command.service" <<'U'
[Unit]
After=systemd-journald.service
DefaultDependencies=no
SuccessAction=exit
FailureAction=exit
[Service]
Type=exec
ExecStart=/bin/bash /run/test/command
U
    cp -r "$1/units/." "$root/etc/systemd/system/"
    cd "$root"
    mkdir run/old
    pivot_root . run/old
    exec </dev/null
    umount -l /run/old
    # As PID 1 does where it is not in a container.
    mount --make-rshared /
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        /lib/systemd/systemd --system --unit=test.target --log-target=journal
}

case $1 in
--cgroup) # PID 1 of the new pid namespace enters its control group before that becomes the root of a namespace
    echo 0 >"$3/cgroup.procs"
    exec unshare --cgroup --propagation unchanged -- "$BASH" "$SELF" --mounts "$2" "$4"
    ;;
--mounts) mounts "$2" "$3" ;;
esac

units=$1 shared=$2
shift 2
work=$(mktemp -d)
tree=$(findmnt -n -r -t cgroup2 -o TARGET | head -n1)
group=$tree/fdbroker-${work##*.}
finish() {
    for _ in {1..50}; do
        [ -d "$group" ] || break
        echo 1 >"$group/cgroup.kill" 2>/dev/null || true
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.05
    done
    rm -rf --one-file-system "$work"
}
trap finish EXIT
mkdir "$work"/{rw,root,io,units} "$group"
cp -r "$units/." "$work/units/"
{
    export -p | grep -vE '^declare -x (SELF|OLDPWD|NOTIFY_SOCKET|LISTEN_|JOURNAL_STREAM|INVOCATION_ID)' || true
    echo 'exec </dev/null >/run/test/output 2>&1'
    printf 'cd %q\n' "$PWD"
    printf '%q ' "$@"
    echo
} >"$work/io/command"
status=0
unshare --pid --mount --uts --ipc --net --fork --kill-child=KILL --propagation private -- \
    "$BASH" "$SELF" --cgroup "$work" "$group" "$shared" </dev/null || status=$?
cat "$work/io/output" 2>/dev/null || true
exit "$status"
