//! Numbers of system calls, for scripts in Perl.

macro_rules! table {
    ($($name:ident)*) => { [$((stringify!($name), libc::$name as i64)),*] };
}

/// Those of this architecture, which is also that of the guests.
const NUMBERS: [(&str, i64); 26] = table![
    O_TMPFILE
    SYS_bpf
    SYS_copy_file_range
    SYS_fadvise64
    SYS_fallocate
    SYS_fchownat
    SYS_fdatasync
    SYS_getxattr
    SYS_inotify_add_watch
    SYS_inotify_init1
    SYS_ioctl
    SYS_linkat
    SYS_listxattr
    SYS_lseek
    SYS_mknodat
    SYS_mmap
    SYS_msync
    SYS_openat
    SYS_personality
    SYS_process_vm_writev
    SYS_removexattr
    SYS_renameat2
    SYS_setxattr
    SYS_statx
    SYS_syncfs
    SYS_userfaultfd
];

/// Replaces these names in a script by the numbers.
pub(crate) fn with_numbers(script: &str) -> String {
    let replace =
        |text: String, (name, number): &(&str, i64)| text.replace(name, &number.to_string());
    let script = NUMBERS.iter().fold(script.to_owned(), replace);
    assert!(!script.contains("SYS_"), "no number: {script}");
    script
}
