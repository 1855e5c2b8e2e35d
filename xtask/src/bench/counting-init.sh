#!/bin/busybox sh
# PID 1 of the emulated host whose instructions are counted: all that it needs is in its initramfs.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /run /tmp
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
$B mount -t debugfs debug /sys/kernel/debug
$B mount -t cgroup2 cgroup2 /sys/fs/cgroup
$B mount -t tmpfs run /run
$B mkdir -p /dev/pts /dev/shm
$B mount -t devpts devpts /dev/pts
# KVM, if it is not built in, and what it needs; then only what the bench names.
kvm=
[ -e /dev/kvm ] && kvm=there
for m in $($B cat /modules/order); do
    [ -n "$kvm" ] && ! $B grep -qsx "$m" /more-modules && continue
    $B insmod "/modules/$m" || echo "counting: no module $m"
    [ "$m" = kvm-amd.ko ] && kvm=there
done
$B ip link set lo up
echo 1 > /proc/sys/kernel/printk
export PATH=/bin HOME=/
# Not in the initramfs itself, which can't be a container's parent.
$B mkdir /run/bundle
$B cp -a /rootfs /config.json /run/bundle/
$B mount --bind /run/bundle/rootfs /run/bundle/rootfs
# The clock skips waits. The kernel of aarch64 is still busy with the end of its own start.
[ "$($B uname -m)" = aarch64 ] && $B sleep 10
/bin/boot $($B cat /arguments) 2>&1
echo "counting: exit $?"
$B poweroff -f
