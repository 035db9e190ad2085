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

/// Becomes `user`, if that is another one, and gives up every capability, for good. The process has one thread.
pub(super) fn drop_privileges(user: Option<User>) -> Result<(), SandboxError> {
    let was_root = geteuid().is_root();
    if was_root {
        // Whatever groups root is in. Refused in the user namespace of a container, where they are its own.
        let left = set_thread_groups(&[]);
        if user.is_some() {
            left.map_err(|e| SandboxError::new("cannot leave root's groups", e, "leave --uid and --gid away"))?;
        }
    }
    if let Some(user) = user.filter(|user| user.uid != geteuid().as_raw() || user.gid != getegid().as_raw()) {
        become_user(user).map_err(|e| {
            SandboxError::new(
                format!("cannot become user {} and group {}", user.uid, user.gid),
                e,
                "only root can, and in a container only become who is known there; leave --uid and --gid away",
            )
        })?;
    }
    // An ordinary user is in one already, without which there are no other namespaces. In this one no user has a number, and
    // capabilities that somebody gets hold of in it count for nothing in the other namespaces, which belong to the host's.
    // To the host the process stays the user that it is.
    if was_root {
        unshare(UnshareFlags::NEWUSER).map_err(|e| {
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
    set_thread_res_gid(gid, gid, gid)?;
    set_keep_capabilities(true)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_capabilities(None, only(CapabilitySet::SYS_ADMIN))
}

fn only(capabilities: CapabilitySet) -> CapabilitySets {
    CapabilitySets { effective: capabilities, permitted: capabilities, inheritable: CapabilitySet::empty() }
}
