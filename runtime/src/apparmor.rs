//! AppArmor on the host: the profile of the threads that work for the guest.
//!
//! The profile of a multi-threaded process can't be changed as a whole, and need not be: threads that serve containerd and
//! mount are trusted, threads that run the guest and serve its devices are not. A thread passes its profile on to the
//! threads that it creates, so the thread that builds the machine changes its profile first.

use crate::Error;
use koya_vmm::host::security_modules::{UNCONFINED, apparmor_file, has_apparmor};
use koya_vmm::host::threads;
use std::fs;
use std::io;
use std::panic::resume_unwind;

/// Runs `work` with this profile on a separate thread; without a profile, on the calling thread.
pub(crate) fn confined<T: Send>(
    profile: Option<&str>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let Some(profile) = profile.filter(|name| *name != UNCONFINED) else {
        return work();
    };
    let confined = || {
        enter(profile).map_err(Error::host(format!(
            "take the AppArmor profile {profile:?}"
        )))?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = threads::spawn_scoped(scope, "koya-confined", confined)
            .map_err(Error::host("start a thread"))?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Changes the profile of the calling thread.
fn enter(profile: &str) -> io::Result<()> {
    if !has_apparmor() {
        let text = "this host's kernel does not have AppArmor enabled";
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    fs::write(apparmor_file(), format!("changeprofile {profile}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_profile_the_work_is_done_here() {
        let here = std::thread::current().id();
        for none in [None, Some(UNCONFINED)] {
            let there = confined(none, || Ok(std::thread::current().id()));
            assert_eq!(there.unwrap(), here);
        }
    }

    #[test]
    fn a_profile_that_is_not_there_is_named_and_nothing_is_done() {
        let mut done = false;
        let refused = confined(Some("koya-no-such-profile"), || {
            done = true;
            Ok(())
        });
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("koya-no-such-profile") && !done, "{error}");
    }
}
