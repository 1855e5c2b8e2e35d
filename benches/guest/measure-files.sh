# What a guest measures of a directory that the host shares.
. /lib.sh
mount -t virtiofs bench /share || echo "cannot mount the share" > /dev/console
S=/share/dir

dd if=/dev/zero of=$S/data bs=1M count=200 2> /dev/null
sync
load fs-read $S/data 200m read 1M 4 7 8
load fs-write $S/data 200m write 1M 4 48 49
load fs-random-read $S/data 200m randread 4k 8 8 8
load fs-random-write $S/data 200m randwrite 4k 8 49 49
rm -f $S/data

# 20,000 empty files in one directory, by the shell itself.
create() {
    mkdir $S/m
    n=0
    while [ $n -lt 20000 ]; do
        : > $S/m/$n
        n=$((n + 1))
    done
}
forget() { echo 3 > /proc/sys/vm/drop_caches; }
timed fs-create create
forget
timed fs-list sh -c "find $S/m | wc -l"
forget
timed fs-stat sh -c "ls -ln $S/m | wc -l"
timed fs-unlink rm -rf $S/m

# A tree as of sources: what is on the tools' disk, many times.
timed fs-unpack tar -xf /tree.tar -C $S
forget
timed fs-walk sh -c "find $S/tree -type f -exec cat {} + | md5sum"
timed fs-remove rm -rf $S/tree

small() { dd if=/dev/zero of="$1" bs=512 count=20000 2> /dev/null; }
timed dd-512 small $S/small
rm $S/small
if mount -t virtiofs writeback /writeback 2> /dev/null; then
    timed dd-512-writeback small /writeback/dir/small
    timed dd-512-tmpfs small /tmp/small
fi
