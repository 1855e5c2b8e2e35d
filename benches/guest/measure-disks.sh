# What a guest measures of its disk and its network. Each figure is one line on the console.
. /lib.sh

load sequential-read "$DATA" 900m read 1M 4 7 8
load sequential-write "$DATA" 900m write 1M 4 48 49
load random-read "$DATA" 900m randread 4k 16 8 8
load random-write "$DATA" 900m randwrite 4k 16 49 49

if [ -e /sys/class/net/eth0 ]; then
    ip addr add 192.0.2.2/24 dev eth0
    ip link set eth0 up
    # The link, and the other side's address.
    until ping -c 1 -W 1 192.0.2.1 > /dev/null; do :; done
    last() { awk '/receiver/ { print $(NF - 2) }'; }
    say tcp-send "$(iperf3 -c 192.0.2.1 -t 5 -f k | last)"
    say tcp-receive "$(iperf3 -c 192.0.2.1 -t 5 -f k -R | last)"
    count round-trip
    average=$(ping -q -c 100 -i 0.02 192.0.2.1 | sed -n 's|.*= [^/]*/\([^/]*\)/.*|\1|p')
    counted round-trip 100
    say round-trip "$average"
fi
