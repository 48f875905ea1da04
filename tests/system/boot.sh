#!/bin/bash
# Runs COMMAND as a unit of a systemd that was booted for it, and returns its exit status.
#
#   boot.sh FILES SHARED COMMAND [ARGUMENT...]
#
# FILES: directories whose contents are put below /, as those of a package; SHARED: directories that are the same
# inside; of both there may be none, or several with a colon between them. The systemd of this machine is PID 1 of
# namespaces of its own (pid, mount, uts, ipc, net, cgroup). Its root is an overlay of /, of which the writes go to a
# tmpfs. Needs root, overlayfs, cgroup2 and util-linux.
set -euo pipefail
SELF=$(readlink -f "$0")

# What is not for a system that has the kernel and the devices of another one.
MASKED="dev-hugepages.mount dev-mqueue.mount proc-sys-fs-binfmt_misc.automount sys-fs-fuse-connections.mount
    sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount systemd-binfmt.service
    systemd-hwdb-update.service systemd-journald-audit.socket systemd-modules-load.service systemd-random-seed.service
    systemd-remount-fs.service systemd-sysctl.service systemd-tmpfiles-setup-dev.service systemd-udev-trigger.service
    systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service kmod-static-nodes.service
    ldconfig.service systemd-journal-catalog-update.service systemd-update-done.service tmp.mount"

mounts() { # in the new mount namespace: PID 1's root at $1/root
    local root=$1/root unit directory files shared
    mount -t tmpfs -o mode=755,size=1g none "$1/rw"
    mkdir "$1/rw/upper" "$1/rw/work"
    mount -t overlay -o "lowerdir=/,upperdir=$1/rw/upper,workdir=$1/rw/work" none "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    # The kernel's settings are those of the machine: nothing inside is to change them.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    mount -t sysfs -o nosuid,nodev,noexec,ro sysfs "$root/sys"
    mount -t cgroup2 -o nosuid,nodev,noexec none "$root/sys/fs/cgroup"
    devices "$root/dev"
    mount -t tmpfs -o nosuid,nodev,mode=755 none "$root/run"
    mkdir -m 755 "$root/run/test"
    mount --bind "$1/io" "$root/run/test"

    # Nothing that this machine has enabled is started.
    mount -t tmpfs -o mode=755 none "$root/etc/systemd/system"
    for unit in $MASKED; do
        ln -s /dev/null "$root/etc/systemd/system/$unit"
    done
    # It would empty the /tmp of the overlay.
    mkdir -p "$root/etc/tmpfiles.d" "$root/etc/systemd/journald.conf.d"
    ln -sf /dev/null "$root/etc/tmpfiles.d/tmp.conf"
    printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/test.conf"
    : >"$root/etc/fstab"
    cat >"$root/etc/systemd/system/test.target" <<'U'
[Unit]
Requires=basic.target
After=basic.target
Wants=test-command.service
U
    cat >"$root/etc/systemd/system/test-command.service" <<'U'
[Unit]
After=basic.target
SuccessAction=exit
FailureAction=exit
[Service]
Type=exec
ExecStart=/bin/bash /run/test/command
U
    IFS=: read -ra files <<<"$2"
    for directory in "${files[@]}"; do
        cp -a "$directory/." "$root/"
    done
    IFS=: read -ra shared <<<"$3"
    for directory in "${shared[@]}"; do
        mkdir -p "$root$directory"
        mount --bind "$directory" "$root$directory"
    done
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

devices() { # a /dev at $1, with all that PrivateDevices= of a unit copies
    local device name major minor
    mount -t tmpfs -o nosuid,mode=755 none "$1"
    for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
        IFS=: read -r name major minor <<<"$device"
        mknod -m 666 "$1/$name" c "$major" "$minor"
    done
    ln -s /proc/self/fd "$1/fd"
    mkdir "$1/shm" "$1/pts"
    mount -t devpts -o nosuid,noexec,newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$1/pts"
    mount -t tmpfs -o nosuid,nodev,mode=1777 none "$1/shm"
    ln -s pts/ptmx "$1/ptmx"
}

case $1 in
--cgroup) # PID 1 of the new pid namespace enters its control group before that becomes the root of a namespace
    echo 0 >"$3/cgroup.procs"
    exec unshare --cgroup --propagation unchanged -- "$BASH" "$SELF" --mounts "$2" "$4" "$5"
    ;;
--mounts) mounts "$2" "$3" "$4" ;;
esac

files=$1 shared=$2
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
mkdir "$work"/{rw,root,io} "$group"
{
    export -p | grep -vE '^declare -x (SELF|OLDPWD|NOTIFY_SOCKET|LISTEN_|JOURNAL_STREAM|INVOCATION_ID)' || true
    echo 'exec </dev/null >/run/test/output 2>&1'
    printf 'cd %q\n' "$PWD"
    printf '%q ' "$@"
    echo
} >"$work/io/command"
status=0
unshare --pid --mount --uts --ipc --net --fork --kill-child=KILL --propagation private -- \
    "$BASH" "$SELF" --cgroup "$work" "$group" "$files" "$shared" </dev/null || status=$?
cat "$work/io/output" 2>/dev/null || true
exit "$status"
