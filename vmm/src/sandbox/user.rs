//! Who the process is: another user if asked for, in a user namespace of its own, with nobody's privileges.

use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags, clear_ambient_capability_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::{SandboxError, unshare};

/// A user and a group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Becomes `user`, if that is another one, and gives up every capability. There is one thread, so it is the process.
pub(super) fn become_nobody(user: Option<User>) -> Result<(), SandboxError> {
    let was_root = geteuid().is_root();
    if let Some(user) = user.filter(|user| user.uid != geteuid().as_raw() || user.gid != getegid().as_raw()) {
        become_user(user).map_err(|e| {
            SandboxError::new(
                format!("cannot become user {} and group {}", user.uid, user.gid),
                e,
                "only root can; leave --uid and --gid away",
            )
        })?;
    }
    // Anybody else has one since the other namespaces.
    if was_root {
        leave_users().map_err(|e| {
            SandboxError::new(
                "cannot get a user namespace of its own",
                e,
                "allow some (`sysctl user.max_user_namespaces=10000`)",
            )
        })?;
    }
    let failed = |e| SandboxError::new("cannot give up capabilities", e, "this is a fault of the kernel's");
    clear_ambient_capability_set().map_err(failed)?;
    set_capabilities(None, only(CapabilitySet::empty())).map_err(failed)?;
    set_no_new_privs(true).map_err(failed)
}

/// Keeps what it takes to get a user namespace where they are not for everybody.
fn become_user(user: User) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_keep_capabilities(true)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_capabilities(None, only(CapabilitySet::SYS_ADMIN))
}

/// Goes into a user namespace in which no user has a number: what privileges somebody may find there hold for nothing outside, and
/// the other namespaces are outside. To the host the process stays who it is.
fn leave_users() -> Result<(), Errno> {
    unshare(UnshareFlags::NEWUSER)
}

fn only(capabilities: CapabilitySet) -> CapabilitySets {
    CapabilitySets { effective: capabilities, permitted: capabilities, inheritable: CapabilitySet::empty() }
}
