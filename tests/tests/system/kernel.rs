//! Features of the guest kernel, as used by programs in containers: it has no modules, so a missing feature cannot be
//! loaded.

use crate::calls::with_numbers;
use crate::debian::debian;
use crate::tool::{busybox, koya, run, run_in, scratch, stdout};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

crate::trials![
    rules_of_meshes_and_firewalls_are_taken,
    a_connection_keeps_its_mark,
    images_of_file_systems_are_mounted,
    links_of_container_networks_are_made,
    features_that_programs_ask_for_are_there,
    the_full_kernel_is_taken_where_it_is_and_else_refused,
];

/// Copies a program of the host and its shared libraries into a root.
fn copy_program(root: &Path, program: &str) -> Result<()> {
    let libraries = stdout(Command::new("ldd").arg(program).output()?)?;
    let paths = libraries.split_whitespace().filter(|w| w.starts_with('/'));
    for path in paths.chain([program]) {
        let to = root.join(&path[1..]);
        fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
        fs::copy(path, to)?;
    }
    Ok(())
}

/// A root with iptables, both nft and legacy.
fn iptables(name: &str) -> Result<std::path::PathBuf> {
    let root = scratch(name)?;
    busybox(&root)?;
    // For the lock of the legacy one.
    fs::create_dir_all(root.join("run"))?;
    for kind in ["nft", "legacy"] {
        copy_program(&root, &format!("/usr/sbin/xtables-{kind}-multi"))?;
        let link = root.join(format!("usr/sbin/iptables-{kind}"));
        symlink(format!("xtables-{kind}-multi"), link)?;
    }
    let extensions = format!("usr/lib/{}-linux-gnu/xtables", std::env::consts::ARCH);
    fs::create_dir_all(root.join(&extensions))?;
    for entry in fs::read_dir(Path::new("/").join(&extensions))? {
        let entry = entry?;
        fs::copy(entry.path(), root.join(&extensions).join(entry.file_name()))?;
    }
    // Additional shared libraries of an extension.
    let statistic = Path::new("/").join(&extensions).join("libxt_statistic.so");
    copy_program(&root, statistic.to_str().context("it is text")?)?;
    Ok(root)
}

fn privileged(root: &Path, script: &str) -> Result<String> {
    stdout(run_in(root, &["--privileged"], &["sh", "-c", script])?)
}

/// One rule for each extension used by Istio, Cilium, kube-proxy, Docker and firewalls.
const RULES: &str = "-t mangle -A PREROUTING -p tcp -j TPROXY --on-port 15006 --tproxy-mark 1
-t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1
-t mangle -A PREROUTING -m connmark --mark 1 -j ACCEPT
-t mangle -A PREROUTING -j CONNMARK --restore-mark
-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-t raw -A PREROUTING -j CT --notrack
-t nat -A POSTROUTING -j MASQUERADE
-t nat -A PREROUTING -p tcp -j REDIRECT --to-ports 1
-t nat -A PREROUTING -d 10.1.0.0/24 -j NETMAP --to 10.2.0.0/24
-A INPUT -m addrtype --dst-type LOCAL -m comment --comment why -j ACCEPT
-A INPUT -p tcp -m multiport --dports 1,2 -j ACCEPT
-A INPUT -m statistic --mode random --probability 0.5 -j ACCEPT
-A INPUT -m recent --name seen --set
-A INPUT -m hashlimit --hashlimit-above 5/sec --hashlimit-mode srcip --hashlimit-name h -j DROP
-A INPUT -m connlimit --connlimit-above 3 -j DROP
-A INPUT -m iprange --src-range 10.0.0.1-10.0.0.9 -j ACCEPT
-A INPUT -m mac --mac-source 02:00:00:00:00:01 -j ACCEPT
-A INPUT -m string --algo bm --string x -j DROP
-A INPUT -j NFLOG --nflog-group 1
-A INPUT -j NFQUEUE --queue-num 0 --queue-bypass";

fn rules_of_meshes_and_firewalls_are_taken() -> Result<()> {
    let root = iptables("kernel-rules")?;
    fs::write(root.join("rules"), format!("{RULES}\n"))?;
    let said = privileged(
        &root,
        "for kind in nft legacy; do while read -r rule; do
             iptables-$kind $rule 2>&1 < /dev/null || echo \"$kind refuses $rule\"
         done < /rules; iptables-$kind -t mangle -S PREROUTING | grep -c ^-A; done",
    )?;
    ensure!(said == "4\n4", "{said}");
    Ok(())
}

fn a_connection_keeps_its_mark() -> Result<()> {
    let root = iptables("kernel-mark")?;
    let said = privileged(
        &root,
        "ip link set lo up
         iptables-nft -t mangle -A OUTPUT -p icmp -j CONNMARK --set-mark 7 || exit
         ping -c 1 -W 10 127.0.0.1 > /dev/null; grep -o mark=7 /proc/net/nf_conntrack",
    )?;
    ensure!(said == "mark=7", "{said}");
    Ok(())
}

fn images_of_file_systems_are_mounted() -> Result<()> {
    let root = scratch("kernel-squashfs")?;
    busybox(&root)?;
    let tree = scratch("kernel-squashfs-tree")?;
    fs::write(tree.join("text"), "from squashfs\n".repeat(10_000))?;
    let kinds = ["gzip", "lz4", "lzo", "xz", "zstd"];
    for kind in kinds {
        let made = Command::new("mksquashfs")
            .arg(&tree)
            .arg(root.join(kind))
            .args(["-noappend", "-quiet", "-no-progress", "-comp", kind])
            .output()?;
        stdout(made)?;
    }
    let mut mkfs = Command::new("/sbin/mke2fs");
    let mkfs = mkfs.args(["-q", "-t", "ext4"]).arg(root.join("ext4"));
    stdout(mkfs.arg("8m").output()?)?;
    // The last one as mount(8) of util-linux 2.38 does it: with the loop device open for writing.
    let said = privileged(
        &root,
        "for kind in gzip lz4 lzo xz zstd; do
             mount -t squashfs -o loop,ro /$kind /mnt && echo $kind $(grep -c 'from squashfs' /mnt/text); umount /mnt
         done
         losetup /dev/loop0 /ext4 && mount -t ext4 /dev/loop0 /mnt 3<> /dev/loop0 && ls /mnt",
    )?;
    let wanted = kinds.map(|kind| format!("{kind} 10000\n")).concat() + "lost+found";
    ensure!(said == wanted, "{said}");
    Ok(())
}

fn links_of_container_networks_are_made() -> Result<()> {
    let root = scratch("kernel-links")?;
    busybox(&root)?;
    let said = privileged(
        &root,
        "ls /sys/class/net
         for kind in wireguard dummy bridge; do
             ip link add kc-$kind type $kind && ip link set kc-$kind up && ip -o link show kc-$kind | grep -o 'kc-[a-z]*'
         done",
    )?;
    // Without a network, no driver adds an interface of its own.
    ensure!(said == "lo\nkc-wireguard\nkc-dummy\nkc-bridge", "{said}");
    Ok(())
}

/// userfaultfd's descriptor and its API handshake, as in QEMU, CRIU and garbage collectors; the counters that vmstat and
/// monitors read (landley/toybox 422); a key for TCP's MD5 signatures, as BGP daemons set it.
fn features_that_programs_ask_for_are_there() -> Result<()> {
    let root = debian()?;
    let script = r#"$fd = syscall(SYS_userfaultfd, 1); $api = pack("Q3", 0xAA, 0, 0);
        die "no userfaultfd: $!" if $fd < 0;
        die "no handshake: $!" if syscall(SYS_ioctl, $fd, 0xc018aa3f, $api) < 0;
        print "its ioctls: ", (unpack("Q3", $api))[2] ? "some" : "none";
        open $file, "<", "/proc/vmstat" or die "no counters: $!";
        %counters = map { split } <$file>;
        print "; faults: ", $counters{pgfault} > 0 ? "some" : "none", "; swapping: ", $counters{pswpin} // "unknown";
        socket $tcp, 2, 1, 0 or die "no socket: $!";
        $key = pack("S n a4 x120 C C S l a80", 2, 0, "\x7f\0\0\1", 0, 0, 6, 0, "secret");
        print "; key: ", setsockopt($tcp, 6, 14, $key) ? "set" : $!;"#;
    let said = stdout(run_in(
        &root,
        &["--privileged"],
        &["perl", "-e", &with_numbers(script)],
    )?)?;
    let wanted = "its ioctls: some; faults: some; swapping: 0; key: set";
    ensure!(said == wanted, "{said}");
    Ok(())
}

/// This kernel is not part of `cargo xtask build`.
fn the_full_kernel_is_taken_where_it_is_and_else_refused() -> Result<()> {
    let there = stdout(koya(["env"]).output()?)?.contains("vmlinux-full");
    let script = r#"uname -r | grep -o koya-full; grep -oE '(nfs4|cifs|xfs)$' /proc/filesystems | sort
        test -s /sys/kernel/btf/vmlinux && echo types
        mount -t tracefs tracefs /mnt && echo p:seen do_sys_openat2 > /mnt/kprobe_events &&
        echo 1 > /mnt/events/kprobes/seen/enable && cat /etc/passwd > /dev/null
        grep -m 1 -o 'cat-.*seen' /mnt/trace | sed 's/-.*:/ is/'"#;
    let options = ["--privileged", "--kernel", "full"];
    let ran = run(&options, &["sh", "-c", script])?;
    if there {
        let said = stdout(ran)?;
        let wanted = "koya-full\ncifs\nnfs4\nxfs\ntypes\ncat is seen";
        ensure!(said == wanted, "{said}");
    } else {
        let said = String::from_utf8(ran.stderr)?;
        let refused = "vmlinux-full; build it with `cargo xtask kernel --full`\n";
        ensure!(
            ran.status.code() == Some(125) && said.ends_with(refused) && said.lines().count() == 1,
            "{}: {said}",
            ran.status
        );
    }
    Ok(())
}
