# What the scripts of measured guests share.
export PATH=/bin LD_LIBRARY_PATH=/lib
SECONDS_EACH=4
say() { echo "RESULT $1 $2" > /dev/console; }

# Name, and what is timed, to a hundredth of a second.
timed() {
    name=$1
    shift
    before=$(cut -d' ' -f1 /proc/uptime)
    "$@" > /dev/null || echo "$name failed" > /dev/console
    after=$(cut -d' ' -f1 /proc/uptime)
    say "$name" "$(echo "$before $after" | awk '{ print $2 - $1 }')"
}

# Before and after what is counted: a name, and how many operations there were.
count() {
    echo "COUNT $1" > /dev/console
    for word in $(cat /proc/cmdline); do
        case $word in wait=*) sleep "${word#wait=}" ;; esac
    done
}
counted() { echo "COUNTED $1 $2" > /dev/console; }

# What fio measures of a file or disk. Name, file, size, fio's pattern, size of a request, requests at
# once, fields of the terse output: the figure, and operations a second. There, 7 and 48 are KiB/s of
# reads and writes, 8 and 49 operations a second.
load() {
    count "$1"
    out=$(fio --name="$1" --filename="$2" --size="$3" --direct=1 --rw="$4" --bs="$5" \
        --iodepth="$6" --ioengine=io_uring --runtime=$SECONDS_EACH --time_based --norandommap \
        --randseed=1 --minimal --terse-version=3) || echo "fio: $out" > /dev/console
    field() { echo "$out" | tail -n 1 | cut -d';' -f"$1"; }
    counted "$1" $(($(field "$8" | cut -d. -f1) * SECONDS_EACH))
    say "$1" "$(field "$7")"
}
