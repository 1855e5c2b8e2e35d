# What a guest measures of its vsock.
. /lib.sh
vsock-load > /dev/console 2>&1
