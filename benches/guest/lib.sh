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
