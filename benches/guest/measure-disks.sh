# What a guest measures of its disk and its network. Each figure is one line on the console.
. /lib.sh

# Name, fio's pattern, size of a request, requests at once, fields of the terse output: the figure, and
# operations a second.
disk() {
    echo "COUNT $1" > /dev/console
    out=$(fio --name="$1" --filename="$DATA" --size=900m --direct=1 --rw="$2" --bs="$3" \
        --iodepth="$4" --ioengine=io_uring --runtime=$SECONDS_EACH --time_based --norandommap --randseed=1 \
        --minimal --terse-version=3) || echo "fio: $out" > /dev/console
    field() { echo "$out" | tail -n 1 | cut -d';' -f"$1"; }
    echo "COUNTED $1 $(($(field "$6" | cut -d. -f1) * SECONDS_EACH))" > /dev/console
    say "$1" "$(field "$5")"
}
# In the terse output: 7 and 48 are KiB/s of reads and writes, 8 and 49 operations a second.
disk sequential-read read 1M 4 7 8
disk sequential-write write 1M 4 48 49
disk random-read randread 4k 16 8 8
disk random-write randwrite 4k 16 49 49

if [ -e /sys/class/net/eth0 ]; then
    ip addr add 192.0.2.2/24 dev eth0
    ip link set eth0 up
    # The link, and the other side's address.
    until ping -c 1 -W 1 192.0.2.1 > /dev/null; do :; done
    last() { awk '/receiver/ { print $(NF - 2) }'; }
    say tcp-send "$(iperf3 -c 192.0.2.1 -t 5 -f k | last)"
    say tcp-receive "$(iperf3 -c 192.0.2.1 -t 5 -f k -R | last)"
    echo "COUNT round-trip" > /dev/console
    average=$(ping -q -c 100 -i 0.02 192.0.2.1 | sed -n 's|.*= [^/]*/\([^/]*\)/.*|\1|p')
    echo "COUNTED round-trip 100" > /dev/console
    say round-trip "$average"
fi
