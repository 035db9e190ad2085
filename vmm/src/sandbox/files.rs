//! Landlock: the directories of this VM, whichever way a path leads. A descriptor of a directory from before would lead
//! out of any root.

use std::io::{Error, ErrorKind};

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr, RulesetCreatedAttr,
};

use super::{Access, Kept, SandboxError};

/// The newest version that we know; an older kernel enforces what it has.
const NEWEST: ABI = ABI::V5;

/// Whether the process, which is `uid` by now, can write where it has to.
pub(super) fn try_writing(dirs: &[Kept], uid: u32) -> Result<(), SandboxError> {
    for Kept { dir, .. } in dirs.iter().filter(|kept| kept.access == Access::MustWrite) {
        rustix::fs::access(dir, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).map_err(|e| {
            SandboxError::new(
                format!("user {uid}, without privileges, cannot write to {}", dir.display()),
                e,
                "give that directory to this user, or the exit file and the serial log another place",
            )
        })?;
    }
    Ok(())
}

/// Restricts the calling thread, which is the only one. A kernel without landlock restricts nothing: the root and the
/// list of system calls are there all the same.
pub(super) fn restrict(dirs: &[Kept]) -> Result<(), SandboxError> {
    let restrict = || -> Result<(), Error> {
        let ruleset = Ruleset::default().handle_access(AccessFs::from_all(NEWEST));
        let mut ruleset = ruleset.and_then(Ruleset::create).map_err(Error::other)?;
        for Kept { dir, access, .. } in dirs {
            let fd = match PathFd::new(dir) {
                Ok(fd) => fd,
                // Not to be entered by who we are: then it needs no rule either.
                Err(PathFdError::OpenCall { source, .. }) if source.kind() == ErrorKind::PermissionDenied => continue,
                Err(e) => return Err(Error::other(e)),
            };
            ruleset = ruleset.add_rule(PathBeneath::new(fd, rights(*access))).map_err(Error::other)?;
        }
        ruleset.restrict_self().map(drop).map_err(Error::other)
    };
    restrict().map_err(|e| {
        SandboxError::new("landlock cannot be set up", e, "permit more open files, if it is these (`ulimit -n`)")
    })
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    match access {
        Access::Read => AccessFs::ReadFile | AccessFs::ReadDir,
        Access::Write | Access::MustWrite => {
            AccessFs::ReadFile
                | AccessFs::ReadDir
                | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::MakeReg
                | AccessFs::MakeSock
                | AccessFs::RemoveFile
                | AccessFs::Refer
        }
    }
}
