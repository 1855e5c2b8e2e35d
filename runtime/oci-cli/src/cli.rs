//! The commands and options: those of runc, so that the same callers can use this program.

// Options that are accepted without effect are not read.
#![allow(dead_code)]

use crate::values::{bytes, valued};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// An OCI runtime: containers that each run in a virtual machine of their own.
#[derive(Parser)]
#[command(
    name = "koya-runtime",
    // The version lines of runc that Docker and others parse.
    version = concat!(
        "version ", env!("CARGO_PKG_VERSION"), "\ncommit: ", env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0"
    ),
    help_template = "NAME:\n   {name} - Open Container Initiative runtime\n\n{about-with-newline}\n\
                     USAGE:\n   {usage}\n\n{all-args}{after-help}",
    disable_version_flag = true,
    arg_required_else_help = true,
    after_help = "These are the commands of an OCI runtime, for engines such as podman; `koya` has commands of its own, \
                  for containers without an engine. The commands and options are runc's. KOYA_SHARE, KOYA_KERNEL and \
                  KOYA_INITRAMFS say where the guest kernel and the agent are."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print the version
    #[arg(short = 'v', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
}

impl Cli {
    /// Parses a command line. If the program is called under the name runc or crun, help and version use that name.
    ///
    /// # Errors
    /// If it is invalid, or a request for help or the version.
    pub(crate) fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let words: Vec<OsString> = words.into_iter().collect();
        let called = words.first().and_then(|word| Path::new(word).file_name());
        let others = ["runc", "crun"].into_iter();
        let mut others = others.filter(|other| called.is_some_and(|name| name == *other));
        let name = others.next().unwrap_or("koya-runtime");
        let command = Self::command().name(name).bin_name(name);
        let command = command.mut_subcommands(|command| command.help_template(COMMAND_HELP));
        let parsed = command.clone().try_get_matches_from(&words);
        let parsed = parsed.or_else(|error| match error.kind() {
            // A flag may have a value.
            ErrorKind::TooManyValues | ErrorKind::UnknownArgument => {
                let command = command
                    .mut_args(valued)
                    .mut_subcommands(|c| c.mut_args(valued));
                command.try_get_matches_from(&words).map_err(|_| error)
            }
            _ => Err(error),
        });
        Self::from_arg_matches(&parsed?)
    }
}

/// The beginning of the help text of a runc command.
const COMMAND_HELP: &str = "NAME:\n   {usage}\n\n{about-with-newline}\n{all-args}";

/// Options before the command.
#[derive(Args)]
pub(crate) struct Globals {
    /// Set the directory for the state of containers (default: /run/koya-runtime, or koya-runtime in $XDG_RUNTIME_DIR
    /// without root)
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Write the log to this file (default: standard error)
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Set the format of the log
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Log debug messages
    #[arg(long)]
    pub(crate) debug: bool,
    /// Accepted without effect: cgroupsPath may have the systemd form or not
    #[arg(long)]
    systemd_cgroup: bool,
    /// Set the cgroup manager: `disabled` leaves the sandbox's process in the caller's control group; the others are the same,
    /// since cgroupsPath may have either form
    #[arg(long, value_enum, default_value = "cgroupfs", value_name = "MANAGER")]
    pub(crate) cgroup_manager: CgroupManager,
    /// Accepted without effect: without root, steps that require it are skipped
    #[arg(long, value_name = "true|false|auto")]
    rootless: Option<String>,
}

/// Who makes the control group of a sandbox's process. An option of crun, which podman passes for `--cgroups=disabled`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CgroupManager {
    Cgroupfs,
    Systemd,
    Disabled,
}

/// Format of the log.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Create a container from a bundle; its process waits to be started
    Create(CreateArgs),
    /// Create and start a container
    Run(RunArgs),
    /// Start the process of a created container
    Start(IdArgs),
    /// Print the state of a container as JSON
    State(IdArgs),
    /// Send a signal to the process of a container
    Kill(KillArgs),
    /// Delete a stopped container
    Delete(DeleteArgs),
    /// Run a process in a container
    Exec(Box<ExecArgs>),
    /// List the processes on the host that represent a container
    Ps(PsArgs),
    /// List containers
    List(ListArgs),
    /// Suspend all processes of a container
    Pause(IdArgs),
    /// Resume all processes of a container
    Resume(IdArgs),
    /// Update the resource limits of a container
    Update(Box<UpdateArgs>),
    /// Print the resource usage of a container, and out-of-memory events
    Events(EventsArgs),
    /// Write a config.json as a starting point
    Spec(SpecArgs),
    /// Print the supported features as JSON
    Features,
    /// Not supported
    Checkpoint(AnyArgs),
    /// Not supported
    Restore(AnyArgs),
    #[command(hide = true)]
    Serve(AnyArgs),
    #[command(hide = true)]
    Stub,
}

#[derive(Args)]
pub(crate) struct IdArgs {
    /// The container
    pub(crate) id: String,
}

#[derive(Args)]
pub(crate) struct AnyArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) words: Vec<String>,
}

#[derive(Args)]
pub(crate) struct CreateArgs {
    /// The bundle: the directory of config.json
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// Read this file instead of config.json in the bundle
    #[arg(long, short = 'f', value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Send the descriptor of the terminal to this socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Write the PID to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Send a pidfd of the container's process to this socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// Pass this many descriptors, 3 and up, to the process: pipes, FIFOs, stream sockets, and files open in one direction
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Accepted without effect: the guest has its own root
    #[arg(long)]
    no_pivot: bool,
    /// Accepted without effect: the guest has its own keyrings
    #[arg(long)]
    no_new_keyring: bool,
    /// The ID of the container, which must be unique
    pub(crate) id: String,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) create: CreateArgs,
    /// Return once the process runs
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Do not delete the container when it has ended
    #[arg(long)]
    pub(crate) keep: bool,
    /// Accepted without effect: processes in the guest are not children of this command
    #[arg(long)]
    no_subreaper: bool,
}

#[derive(Args)]
pub(crate) struct KillArgs {
    /// Signal all processes of the container
    #[arg(long, short)]
    pub(crate) all: bool,
    /// The container
    pub(crate) id: String,
    /// The signal, by number or name
    #[arg(default_value = "SIGTERM")]
    pub(crate) signal: String,
}

#[derive(Args)]
pub(crate) struct DeleteArgs {
    /// Kill the container first if it runs; it need not exist
    #[arg(long, short)]
    pub(crate) force: bool,
    /// The container
    pub(crate) id: String,
}

#[derive(Args)]
pub(crate) struct ExecArgs {
    /// Send the descriptor of the terminal to this socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Set the working directory (default: that of the container)
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// Add an environment variable to those of the container
    #[arg(long, short, value_name = "K=V")]
    pub(crate) env: Vec<String>,
    /// Allocate a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Set the user and group, by ID
    #[arg(long, short, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// Add supplementary groups, by ID
    #[arg(long, short = 'g', value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// Read the process from a file, in the form of config.json
    #[arg(long, short, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Return once the process runs
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Write the PID to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Send a pidfd of the process to this socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) pidfd_socket: Option<PathBuf>,
    /// Accepted without effect: SELinux labels apply to the process of the sandbox
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Accepted without effect: AppArmor profiles apply to the process of the sandbox
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Prevent the process from gaining privileges by execve(2)
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// Add a capability to those of the container
    #[arg(long, short, value_name = "CAP")]
    pub(crate) cap: Vec<String>,
    /// Pass this many descriptors, 3 and up, to the process: pipes, FIFOs, stream sockets, and files open in one direction
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Set the control group, as a path below that of the container
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Vec<String>,
    /// Accept a paused container: the process starts when the container is resumed
    #[arg(long)]
    pub(crate) ignore_paused: bool,
    /// The container
    pub(crate) id: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

/// Output format of a list.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Args)]
pub(crate) struct PsArgs {
    /// Set the output format
    #[arg(long, short, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// The container
    pub(crate) id: String,
    /// Options of ps(1)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
}

#[derive(Args)]
pub(crate) struct ListArgs {
    /// Set the output format
    #[arg(long, short, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Print only IDs
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Args)]
pub(crate) struct UpdateArgs {
    /// Read limits from a JSON file in the form of linux.resources in config.json (- for standard input); absent limits keep their values
    #[arg(long, short, value_name = "FILE")]
    pub(crate) resources: Option<String>,
    /// Set the CPU time per period, in microseconds
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// Set the period, in microseconds
    #[arg(long)]
    pub(crate) cpu_period: Option<u64>,
    /// Set the relative share of CPU time
    #[arg(long)]
    pub(crate) cpu_share: Option<u64>,
    /// Set the unused CPU time that can be accumulated beyond the quota, in microseconds
    #[arg(long)]
    pub(crate) cpu_burst: Option<u64>,
    /// Run only on otherwise idle CPUs (1), or normally (0)
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_idle: Option<i64>,
    /// Not supported: cgroup v2 has no such limit
    #[arg(long)]
    pub(crate) cpu_rt_period: Option<u64>,
    /// Not supported: cgroup v2 has no such limit
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_rt_runtime: Option<i64>,
    /// Set the relative share of disk I/O on the host, 10 to 1000
    #[arg(long)]
    pub(crate) blkio_weight: Option<u16>,
    /// Set the allowed CPUs
    #[arg(long)]
    pub(crate) cpuset_cpus: Option<String>,
    /// Set the allowed memory nodes
    #[arg(long)]
    pub(crate) cpuset_mems: Option<String>,
    /// Set the memory limit: bytes, or with a unit (k, m, g); -1 for no limit
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory: Option<i64>,
    /// Set the memory reservation
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory_reservation: Option<i64>,
    /// Set the limit of memory and swap together
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory_swap: Option<i64>,
    /// Accepted without effect, like runc: control groups of version 2 have no such limit
    #[arg(long, hide = true, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) kernel_memory: Option<i64>,
    /// Accepted without effect, like runc: control groups of version 2 have no such limit
    #[arg(long, hide = true, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) kernel_memory_tcp: Option<i64>,
    /// Not supported: a guest has no such control
    #[arg(long, hide = true)]
    pub(crate) l3_cache_schema: Option<String>,
    /// Not supported: a guest has no such control
    #[arg(long, hide = true)]
    pub(crate) mem_bw_schema: Option<String>,
    /// Set the maximum number of processes and threads
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// The container
    pub(crate) id: String,
}

#[derive(Args)]
pub(crate) struct EventsArgs {
    /// Set the interval
    #[arg(long, default_value = "5s", value_name = "TIME")]
    pub(crate) interval: String,
    /// Print the statistics once and exit
    #[arg(long)]
    pub(crate) stats: bool,
    /// The container
    pub(crate) id: String,
}

#[derive(Args)]
pub(crate) struct SpecArgs {
    /// The directory of the file
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// Accepted without effect: the file is the same, since root in the guest does not need root on the host
    #[arg(long)]
    pub(crate) rootless: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_runcs_callers_pass_is_understood() {
        let lines = [
            "--root /r --log /l --log-format json --systemd-cgroup create --bundle /b --pid-file /p \
             --console-socket /s --no-pivot --no-new-keyring --preserve-fds 0 c",
            "--root /r --log /l --log-format json exec --process /f --console-socket /s --detach --pid-file /p c",
            "--rootless=true --debug kill --all c 9",
            "--rootless auto --cgroup-manager disabled create --config /b/config.json c",
            "kill c",
            "delete --force c",
            "ps --format json c",
            "update --resources - c",
            "update --memory -1 --cpu-quota -1 c",
            "events --stats c",
            "events --interval=1s c",
            "checkpoint --image-path /i --leave-running c",
            "exec --user 1:2 --additional-gids 3 --cap CAP_KILL -e A=b c ls -l",
            "run -d -b /b c",
            "features",
            "spec --rootless --bundle /b",
            "exec --cgroup / --ignore-paused c true",
        ];
        for line in lines {
            let words = std::iter::once("koya-runtime").chain(line.split_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn flags_may_have_values() {
        let read = |line: &str| {
            let words = std::iter::once("koya-runtime").chain(line.split_whitespace());
            Cli::read(words.map(OsString::from))
        };
        let run = |line: &str| {
            let cli = read(line).unwrap();
            let Command::Run(args) = cli.command else {
                panic!("{line}");
            };
            (cli.globals.debug, args.detach, args.keep)
        };
        let of = [
            ("run -d c", (false, true, false)),
            (
                "--debug=true run --detach=false --keep c",
                (true, false, true),
            ),
            (
                "--systemd-cgroup=true --debug=0 run -d --keep=1 c",
                (false, true, true),
            ),
            ("--debug run --detach=T c", (true, true, false)),
        ];
        for (line, expected) in of {
            assert_eq!(run(line), expected, "{line}");
        }
        let Command::Exec(args) = read("exec --detach=true -t c ls --all=true")
            .unwrap()
            .command
        else {
            panic!("another command");
        };
        assert!(args.detach && args.tty);
        assert_eq!(args.args, ["ls", "--all=true"]);
        for bad in ["--debug=x list", "run --detach=yes c", "run --none=true c"] {
            let error = read(bad).err().unwrap().to_string();
            assert!(
                error.contains("--debug") || error.contains("--detach") || error.contains("--none")
            );
        }
    }

    /// Output of the command for help and the version.
    fn printed(words: &[&str]) -> String {
        match Cli::read(words.iter().map(OsString::from)) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{words:?}"),
        }
    }

    #[test]
    fn help_and_version_begin_as_runcs() {
        for (called, name) in [
            ("/usr/bin/runc", "runc"),
            ("/usr/bin/crun", "crun"),
            ("/x/koya-runtime", "koya-runtime"),
        ] {
            let lines = |words: &[&str]| {
                let text = printed(&[&[called], words].concat());
                let lines = text.lines().filter(|line| !line.is_empty());
                lines.map(str::to_owned).collect::<Vec<_>>()
            };
            let version = lines(&["--version"]);
            let expected = format!("{name} version {}", env!("CARGO_PKG_VERSION"));
            assert_eq!(version[0], expected);
            assert!(version[1].starts_with("commit: ") && version[2].starts_with("spec: "));
            let help = lines(&["-h"]);
            let expected = format!("   {name} - Open Container Initiative runtime");
            assert_eq!((help[0].as_str(), &help[1]), ("NAME:", &expected));
            for command in ["create", "exec", "checkpoint", "restore", "ps", "features"] {
                for option in ["-h", "--help"] {
                    let help = lines(&[command, option]);
                    let expected = format!("   {name} {command}");
                    assert!(
                        help[0] == "NAME:" && help[1].starts_with(&expected),
                        "{help:?}"
                    );
                }
            }
        }
    }
}
