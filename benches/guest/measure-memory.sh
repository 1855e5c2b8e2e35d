# A guest that takes memory and gives it up: the host looks when it is back.
. /lib.sh
mount -o remount,size=95% /tmp
for word in $(cat /proc/cmdline); do
    case $word in gib=*) gib=${word#gib=} ;; esac
done
# What the start itself gave up goes back first.
sleep 5
echo EMPTY > /dev/console
dd if=/dev/zero of=/tmp/fill bs=1M count=$((gib * 1024)) 2> /dev/null
echo FILLED > /dev/console
rm /tmp/fill
echo "FREED back" > /dev/console
# The host ends this guest when it has seen enough.
sleep 1000
