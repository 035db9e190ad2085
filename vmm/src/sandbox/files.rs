//! Landlock: the directories of this VM, whichever way a path leads. A descriptor of a directory from before would lead
//! out of any root.

use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
};

use super::{Access, SandboxError};

/// The newest version that we know; an older kernel enforces what it has.
const NEWEST: ABI = ABI::V5;

/// Restricts the calling thread, which is the only one. A kernel without landlock restricts nothing: the root and the
/// list of system calls are there all the same.
pub(super) fn restrict(dirs: &[(PathBuf, Access)]) -> Result<(), SandboxError> {
    let restrict = || -> Result<(), RulesetError> {
        let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?.create()?;
        for (dir, access) in dirs {
            // Gone, or not to be seen: then it needs no rule either.
            let Ok(fd) = PathFd::new(dir) else { continue };
            ruleset = ruleset.add_rule(PathBeneath::new(fd, rights(*access)))?;
        }
        ruleset.restrict_self()?;
        Ok(())
    };
    restrict().map_err(|e| {
        SandboxError::new("landlock refuses its rules", std::io::Error::other(e), "this is a fault of the kernel's")
    })
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    match access {
        Access::Read => AccessFs::ReadFile | AccessFs::ReadDir,
        Access::Write => {
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
