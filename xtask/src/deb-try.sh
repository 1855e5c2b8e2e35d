# Trial of the package on a Debian without Koya: installed by apt, used by `koya`, Docker and `koya-runtime`, and purged.
# Runs in the rig, as root. $1: tar archive of the Debian, $2: the package, $3: tar archive of busybox's files.
set -eu
root=/run/scratch/debian
modules=/run/koya-rig/modules
for module in $(cat $modules/docker); do busybox insmod $modules/$module 2> /dev/null || true; done
mkdir -p $root/trial
tar -C $root -xf "$1"
cp "$2" $root/trial/koya.deb
cp "$3" $root/trial/busybox.tar
# Entered by pivot_root(2), since user namespaces can't be created after chroot(2).
cat > $root/trial/try.sh <<'END_OF_TRY'
set -eu
unset KOYA_SHARE KOYA_KERNEL KOYA_INITRAMFS
export LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
# Files that belong to no package, without those of apt, Docker and its containerd. Docker recommends e2fsprogs, which stays, with the links that enable
# its units.
files() {
    cat /var/lib/dpkg/info/*.list | sort -u > /tmp/owned
    find / -xdev \( -path /mnt -o -path /root -o -path /trial -o -path /var/cache -o -path /var/log -o -path /var/lib/apt -o -path /var/lib/dpkg \
        -o -path /var/lib/docker -o -path /var/lib/containerd -o -path /opt/containerd \) -prune -o -print | grep -av 'ld.so.cache\|e2scrub' | sort |
        comm -23 - /tmp/owned
}
said() { echo "try: $*"; }
quietly() { "$@" > /tmp/log 2>&1 || { cat /tmp/log; said "failed: $*"; exit 1; }; }

files > /trial/before
quietly apt-get install -y /trial/koya.deb
said "installed: $(dpkg-query --show koya)"
koya check
mkdir /trial/bb
tar -C /trial/bb -xf /trial/busybox.tar
koya run --rootfs /trial/bb -- uname -r | grep koya
koya run --net user --rootfs /trial/bb -- ip address show eth0 | grep -o 'inet [0-9.]*'
said "koya run"

cp /usr/share/doc/koya/examples/docker-daemon.json /etc/docker/daemon.json
dockerd > /var/log/dockerd.log 2>&1 &
for second in $(seq 120); do ! docker version > /tmp/log 2>&1 || break; sleep 1; done
quietly docker import /trial/busybox.tar busybox
docker run --rm --runtime koya busybox uname -r | grep koya
docker run --detach --name web --runtime koya --publish 8080:80 busybox \
    sh -c 'echo pong > /index.html; exec httpd -f -h /' > /tmp/log
page() { perl -MIO::Socket::INET -e '
    $s = IO::Socket::INET->new("127.0.0.1:8080") or exit 1; print $s "GET / HTTP/1.0\r\n\r\n"; print <$s>'; }
for second in $(seq 60); do page | grep pong && break; sleep 1; done
page | grep -q pong
docker rm --force web > /tmp/log
said "docker run --runtime koya, with Docker $(docker version --format '{{.Server.Version}}')"

mkdir -p /trial/bundle
ln -s /trial/bb /trial/bundle/rootfs
koya-runtime spec --bundle /trial/bundle
sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"uname", "-r"/' /trial/bundle/config.json
koya-runtime run --bundle /trial/bundle tried | grep koya
said "koya-runtime run"

kill "$(cat /run/docker.pid)"
wait
rm /etc/docker/daemon.json
quietly apt-get remove -y koya
if ls /usr/bin/koya* /usr/bin/containerd-shim-koya* 2> /tmp/log; then said "programs are left"; exit 1; fi
quietly apt-get purge -y --autoremove koya
files > /trial/after
diff /trial/before /trial/after || { said "this is left of it"; exit 1; }
said "purged: nothing is left"
END_OF_TRY
unshare --mount sh -c "mount --bind $root $root && cd $root && mount --rbind /proc proc && mount --rbind /sys sys &&
    mount --rbind /dev dev && mount -t tmpfs run run && mount -t tmpfs tmp tmp && pivot_root . mnt && cd / &&
    exec sh /trial/try.sh"
