#!/bin/busybox sh
# PID 1 of the rig: an emulated host with a real KVM, over the machine's own files.
# The files are read-only below and a tmpfs above, so nothing outside is changed.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /host /upper /new
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
port() {
    for p in /sys/class/virtio-ports/*; do
        if [ "$($B cat "$p/name" 2>/dev/null)" = "$1" ]; then echo "dev/${p##*/}"; return; fi
    done
}
# Relative names: /dev moves below, and the working directory with it.
cd /
exec 3> "$(port status)"
STDIN=$(port stdin) STDOUT=$(port stdout) STDERR=$(port stderr)
finish() {
    echo "$1" >&3
    $B sync
    $B poweroff -f
}
for m in $($B cat /modules/order); do
    # Without an interface from the start, whose name tests use.
    case $m in dummy.ko) options=numdummies=0 ;; *) options= ;; esac
    $B insmod "/modules/$m" $options || finish "failed: module $m"
done
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host \
    || finish "failed: no 9p root"
# Programs of another architecture than that of the machine lie over its files.
LOWER=/host
if $B grep -q programs /sys/bus/virtio/devices/*/mount_tag; then
    $B mkdir /programs
    $B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro programs /programs \
        || finish "failed: no programs"
    LOWER=/programs:/host
fi
$B mount -t tmpfs -o size=75% upper /upper
$B mkdir /upper/up /upper/work
$B mount -t overlay -o lowerdir=$LOWER,upperdir=/upper/up,workdir=/upper/work new /new \
    || finish "failed: no overlay"
cd /new || finish "failed: no root"
for d in proc sys dev; do $B mkdir -p $d; $B mount --move /$d $d; done
$B mkdir -p dev/pts dev/shm
$B mount -t devpts -o ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
$B rm -f dev/ptmx; $B ln -s pts/ptmx dev/ptmx
$B ln -sf /proc/self/fd dev/fd
$B ln -sf /proc/self/fd/0 dev/stdin
$B ln -sf /proc/self/fd/1 dev/stdout
$B ln -sf /proc/self/fd/2 dev/stderr
$B mount -t tmpfs shm dev/shm
$B mount -t tmpfs run run
$B mount -t cgroup2 cgroup2 sys/fs/cgroup
$B mkdir -p run/koya-rig run/scratch
$B mount -t ext4 dev/vda run/scratch || finish "failed: no scratch disk"
$B cp /job/run run/koya-rig/run
$B mkdir run/koya-rig/modules
for m in docker $($B cat /modules/docker); do $B cp "/modules/$m" run/koya-rig/modules/; done
# The namespace's root itself: in another directory (chroot) nobody may make user namespaces.
$B mount --move . / || finish "failed: no root"
$B ip link set lo up
# ip-netns makes this directory a shared mount when it is first used, and copies the mounts below: those that another program
# made there would be mounted twice from then on, and could not be removed.
$B mkdir run/netns
$B mount --bind run/netns run/netns
$B mount --make-shared run/netns
$B hostname rig
# As udev has it.
$B chmod 0666 dev/kvm dev/net/tun
# KVM of x86_64 patches its own code when the first virtual machine comes, when the last goes, and when
# local APICs are switched on or off (static keys). QEMU's emulation of several CPUs can run a stale
# copy of patched code, which the kernel takes for a stray breakpoint. One machine that is never
# run keeps these keys where they are.
# (A shell opens /dev/null for what it starts in the background, and /dev has moved.)
$B mknod /dev/null c 1 3
if [ "$($B uname -m)" = x86_64 ]; then
    $B chroot . /usr/bin/perl -e '
        open(K, "+<", "/dev/kvm") or die; my $vm = ioctl(K, 0xae01, 0) or die;
        open(V, "+<&=", $vm) or die; ioctl(V, 0xae60, 0) or die; ioctl(V, 0xae41, 0) or die;
        sleep' < dev/null > dev/null 2>&1 3>&- &
fi
# A program that dies of a fault is noted by the kernel, which is told below.
echo 1 > proc/sys/kernel/print-fatal-signals
echo ready >&3
while $B sleep 5; do echo alive >&3; done < dev/null &
run() {
    $B chroot . /bin/sh /run/koya-rig/run
    STATUS=$?
    [ $STATUS = 0 ] && return
    FAULTS='fatal signal|Comm: |segfault|general protection|traps: |Out of memory|BUG: |Oops'
    $B dmesg | $B grep -E "$FAULTS" | $B tail -n 40 | $B sed 's/^/rig: /' >&2
}
if [ -e /job/interactive ]; then
    export TERM="$($B cat /job/interactive)"
    $B setsid -c $B chroot . /bin/sh /run/koya-rig/run < dev/hvc0 > dev/hvc0 2>&1 3>&-
    STATUS=$?
else
    run < "$STDIN" > "$STDOUT" 2> "$STDERR" 3>&-
fi
finish "exit $STATUS"
