#!/bin/busybox sh
# PID 1 of a measured guest: finds its tools, whatever order its disks are in, and measures what the
# command line names.
B=/bin/busybox
$B mount -t devtmpfs dev /dev
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
for disk in /sys/block/vd*; do
    case $($B cat "$disk/serial") in
        tools) tools=/dev/${disk##*/} ;;
        data) export DATA="/dev/${disk##*/}" ;;
    esac
done
for word in $($B cat /proc/cmdline); do
    case $word in measure=*) what=${word#measure=} ;; esac
done
$B mount -t ext4 -o ro "$tools" /tools
for dir in dev proc sys; do $B mount --move /$dir /tools/$dir; done
$B mount -t tmpfs tmp /tools/tmp
$B chroot /tools /bin/busybox sh "/measure-$what.sh"
echo MEASURED > /tools/dev/console
$B reboot -f
