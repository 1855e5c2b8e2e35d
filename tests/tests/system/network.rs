//! virtio-net: guests that reach their host and the outside world, and are reached themselves.
//!
//! Each test has its own network namespaces, so the machine's network is not changed.

use crate::tool::{scratch, shared_rootfs, stdout};
use anyhow::{Result, ensure};
use std::fs::File;
use std::io::Read;
use std::process::Command;

crate::trials![
    a_tap_carries_data_both_ways,
    a_tap_is_as_it_was_asked_for,
    user_networks_need_no_root,
    published_datagrams_are_answered,
    the_host_itself_is_out_of_reach,
    many_connections_at_once_reach_a_host_without_routes,
    what_does_not_fit_is_refused,
];

/// Runs a script in a network namespace of its own; `$R` is a root file system, `$D` a directory with 20 MB of random bytes
/// in `blob`.
fn in_namespace(name: &str, script: &str) -> Result<String> {
    let dir = scratch(name)?;
    let blob = File::create(dir.join("blob"))?;
    std::io::copy(
        &mut File::open("/dev/urandom")?.take(20_000_000),
        &mut &blob,
    )?;
    let prelude = "set -e; ip link set lo up\n";
    let output = Command::new("timeout")
        .args(["400", "unshare", "--net", "--mount", "sh", "-c"])
        .arg(format!("{prelude}{script}"))
        .env("R", shared_rootfs())
        .env("D", &dir)
        .output()?;
    stdout(output)
}

/// Beginning of a script: a host outside, to which the default route leads. `out` runs a command there.
const OUTSIDE: &str = r#"
        unshare --net sleep 1000 & outside=$!
        trap "kill $outside" EXIT
        while [ "$(readlink /proc/$outside/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
        out() { nsenter --target $outside --net "$@"; }
        ip link add up0 type veth peer name out0 netns $outside
        ip addr add 198.51.100.2/24 dev up0; ip link set up0 up
        out ip addr add 198.51.100.1/24 dev out0; out ip link set out0 up
        ip route add default via 198.51.100.1
"#;

fn a_tap_carries_data_both_ways() -> Result<()> {
    let said = in_namespace(
        "net-tap",
        r#"
        /bin/busybox httpd -p 7000 -h $D
        koya run --net tap --rootfs $R -v $D:/data --cpus 2 -- sh -ec '
            host=$(ip route | sed -n "s/^default via \([0-9.]*\).*/\1/p")
            ping -c 1 -W 10 $host > /dev/null; echo pong
            wget -q -O - http://$host:7000/blob | sha256sum
            httpd -p 80 -h /data
            ip -o -4 addr show eth0 | sed "s/.*inet \([^/]*\).*/\1/" > /data/new; mv /data/new /data/ready
            until [ -e /data/done ]; do sleep 0.2; done' & guest=$!
        until [ -e $D/ready ]; do kill -0 $guest; sleep 0.2; done
        /bin/busybox wget -q -O - http://$(cat $D/ready)/blob | sha256sum; touch $D/done
        wait $guest; sha256sum < $D/blob
        ip -o link | grep -vc LOOPBACK || true"#,
    )?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines.len() == 5 && lines[0] == "pong", "{said}");
    ensure!(lines[1..4].iter().all(|sum| *sum == lines[1]), "{said}");
    ensure!(lines[4] == "0", "an interface is left: {said}");
    Ok(())
}

fn a_tap_is_as_it_was_asked_for() -> Result<()> {
    let said = in_namespace(
        "net-own",
        r#"
        ip tuntap add koya-test mode tap
        ip addr add 192.0.2.1/24 dev koya-test; ip addr add 2001:db8::1/64 dev koya-test nodad
        koya run --net tap:koya-test --ip 192.0.2.77/24 --gateway 192.0.2.1 --mac 02:00:00:00:00:77 --mtu 9000 \
            --rootfs $R -- sh -ec '
            cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
            ip -o -4 addr show eth0 | sed "s/.*inet \([^ ]*\).*/\1/"
            ip route | sed -n "s/^default via \([^ ]*\).*/\1/p"
            ping -c 1 -W 10 -s 8900 192.0.2.1 > /dev/null; echo large'
        ip -o link show koya-test | grep -c koya-test"#,
    )?;
    let wanted = "02:00:00:00:00:77\n9000\n192.0.2.77/24\n192.0.2.1\nlarge\n1";
    ensure!(said.trim_end() == wanted, "{said}");
    Ok(())
}

fn user_networks_need_no_root() -> Result<()> {
    let said = in_namespace(
        "net-user",
        &[
            OUTSIDE,
            r#"
        out /bin/busybox httpd -p 7000 -h $D
        printf 'search a.example b.example\nnameserver 127.0.0.53\noptions ndots:2\n' > $D/resolv
        mount --bind $D/resolv /etc/resolv.conf
        chown 65534:65534 $D
        as_user() { env HOME=$D setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; }
        as_user koya run --net user --publish 8080:80 --rootfs $R --tmpfs /tmp -v $D:/data -- sh -ec '
            tr "\n" " " < /etc/resolv.conf; echo
            wget -q -O - http://198.51.100.1:7000/blob | sha256sum
            cd /tmp; echo from the guest > index.html; httpd -p 80 -h .
            until [ -e /data/done ]; do sleep 0.2; done' > $D/said 2>&1 & guest=$!
        until /bin/busybox wget -q -O $D/answer http://127.0.0.1:8080/ 2> /dev/null; do
            kill -0 $guest 2> /dev/null || break; sleep 0.3
        done
        out /bin/busybox wget -q -O $D/outside http://198.51.100.2:8080/
        touch $D/done; wait $guest; cat $D/said $D/answer $D/outside; sha256sum < $D/blob
        # What spoke for the guest goes with it.
        while /bin/busybox pgrep -x "pasta.*" > /dev/null; do sleep 0.2; done"#,
        ]
        .concat(),
    )?;
    let lines: Vec<&str> = said.lines().collect();
    let [resolver, guest, answer, outside, blob] = lines.as_slice() else {
        anyhow::bail!("{said}");
    };
    let expected = "nameserver 169.254.1.1 search a.example b.example options ndots:2";
    ensure!(resolver.trim() == expected, "{said}");
    ensure!(
        guest == blob && answer == outside && *answer == "from the guest",
        "{said}"
    );
    Ok(())
}

/// Replies with each datagram to its sender.
const ECHO: &str = r#"
    use IO::Socket::INET;
    my $s = IO::Socket::INET->new(Proto => "udp", LocalPort => 53) or die $!;
    while (1) { my $from = $s->recv(my $text, 9000); $s->send($text, 0, $from) }"#;

/// From the host's loopback, to which pasta does not forward, and from outside.
fn published_datagrams_are_answered() -> Result<()> {
    let script = r#"
        koya run --net user -p 5353:53/udp --rootfs / --read-only -v $D:/mnt -- sh -ec '
            perl /mnt/echo & server=$!
            until [ -e /mnt/done ]; do sleep 0.2; done; kill $server' > $D/said 2>&1 & guest=$!
        ask() { text=$1; to=$2; shift 2; printf "$text" | "$@" socat -t 3 - UDP:$to:5353; }
        until [ "$(ask up 127.0.0.1)" = up ]; do kill -0 $guest 2> /dev/null || break; done
        for text in one two; do ask "$text " 127.0.0.1; done
        ask three 198.51.100.2 out; echo
        touch $D/done; wait $guest; cat $D/said"#;
    let files = format!("cat > $D/echo <<'END'\n{ECHO}\nEND\n");
    let said = in_namespace("net-datagrams", &format!("{files}{OUTSIDE}{script}"))?;
    ensure!(said.trim_end() == "one two three", "{said}");
    Ok(())
}

/// A guest that sends frames for the host's loopback out of its interface, which pasta would connect.
fn the_host_itself_is_out_of_reach() -> Result<()> {
    let said = in_namespace(
        "net-local",
        r#"
        ip link add up0 type veth peer name up1; ip link set up1 up; ip addr add 198.51.100.2/24 dev up0; ip link set up0 up
        ip route add default via 198.51.100.1
        # Of another interface than the one that pasta copies.
        ip addr add 203.0.113.5/24 dev up1
        for at in 127.0.0.1:7777 127.0.0.2:7777 198.51.100.2:7778 203.0.113.5:7779; do
            /bin/busybox httpd -p $at -h $D
        done
        /bin/busybox wget -q -O - http://203.0.113.5:7779/blob | wc -c
        /bin/busybox wget -q -O - http://127.0.0.2:7777/blob | wc -c
        koya run --net user --privileged --rootfs $R -- sh -c '
            echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet
            ip route del local 127.0.0.0/8 dev lo table local
            ip addr del 198.51.100.2/24 dev eth0; ip addr add 198.51.100.3/24 dev eth0
            ip route add default via 198.51.100.1
            ip route add 127.0.0.2/32 via 198.51.100.1 dev eth0
            sent=$(cat /sys/class/net/eth0/statistics/tx_packets)
            for at in 127.0.0.2:7777 198.51.100.2:7778 203.0.113.5:7779; do
                timeout 4 wget -q -O - http://$at/blob > /dev/null 2>&1 && echo reached $at
            done
            [ $(cat /sys/class/net/eth0/statistics/tx_packets) -gt $sent ] && echo sent'"#,
    )?;
    ensure!(said.trim_end() == "20000000\n20000000\nsent", "{said}");
    Ok(())
}

/// Answers each line, and sends `end` when the client shuts down.
const LINES: &str = r#"
    use IO::Socket::INET; use IO::Select;
    my $l = IO::Socket::INET->new(Listen => 1024, LocalPort => 80) or die $!;
    my $s = IO::Select->new($l);
    while (1) {
        for my $h ($s->can_read) {
            if ($h == $l) { $s->add($l->accept); next }
            if (sysread($h, my $line, 100)) { syswrite($h, "got $line"); next }
            syswrite($h, "end\n"); $s->remove($h); close($h);
        }
    }"#;

/// Opens this many connections, and closes them once all have a reply.
const CALLS: &str = r#"
    use IO::Socket::INET;
    my $count = shift;
    my @all = map { IO::Socket::INET->new(PeerAddr => "127.0.0.1:8080") or die "$_: $!" } 1 .. $count;
    syswrite($all[$_], "$_\n") for 0 .. $#all;
    for (0 .. $#all) { my $h = $all[$_]; my $line = <$h> // ""; $line eq "got $_\n" or die "$_: <$line>" }
    shutdown($_, 1) for @all;
    for my $h (@all) { my $line = <$h> // ""; $line eq "end\n" or die "<$line>" }
    print "all $count\n";"#;

/// The namespace has only a loopback interface. The number of connections exceeds the default limit of 1024 descriptors, on
/// both sides.
fn many_connections_at_once_reach_a_host_without_routes() -> Result<()> {
    let script = r#"
        koya run --net user --publish 8080:80 --rootfs / --read-only -v $D:/mnt -- sh -ec '
            ip -o -4 addr show eth0 | sed "s/.*inet \([^ ]*\).*/\1/"
            ip route | sed -n "s/^default via \([^ ]*\).*/\1/p"
            perl /mnt/lines & server=$!
            until [ -e /mnt/done ]; do sleep 0.2; done; kill $server' > $D/said 2>&1 & guest=$!
        until perl $D/calls 1 > /dev/null 2>&1; do
            kill -0 $guest 2> /dev/null || break; sleep 0.5
        done
        perl $D/calls 600 > $D/many 2>&1 || true
        touch $D/done; wait $guest; cat $D/said $D/many"#;
    let files =
        format!("cat > $D/lines <<'END'\n{LINES}\nEND\ncat > $D/calls <<'END'\n{CALLS}\nEND\n");
    let said = in_namespace("net-alone", &format!("{files}{script}"))?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(
        lines == ["169.254.2.2/24", "169.254.2.1", "all 600"],
        "{said}"
    );
    Ok(())
}

fn what_does_not_fit_is_refused() -> Result<()> {
    for (options, wanted) in [
        (vec!["--publish", "80:80"], "--publish needs --net user"),
        (
            vec!["--net", "user", "--ip", "192.0.2.1/24"],
            "--ip needs --net tap",
        ),
        (vec!["--net", "tap:mine"], "requires --ip"),
        (vec!["--mtu", "1400"], "--mtu needs"),
        (vec!["--net", "bridge"], "is not one of none, user, tap"),
    ] {
        let output = crate::tool::run(&options, &["true"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(wanted), "{said}");
    }
    Ok(())
}
