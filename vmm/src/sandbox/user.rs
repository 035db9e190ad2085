//! Who the process is: another user if asked for, and nobody's privileges.

use rustix::process::{getegid, geteuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::SandboxError;

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
    if let Some(user) = user.filter(|user| user.uid != geteuid().as_raw() || user.gid != getegid().as_raw()) {
        let failed = |e: rustix::io::Errno| {
            SandboxError::new(
                format!("cannot become user {} and group {}", user.uid, user.gid),
                e,
                "only root can; leave --uid and --gid away",
            )
        };
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        set_thread_groups(&[]).map_err(failed)?;
        set_thread_res_gid(gid, gid, gid).map_err(failed)?;
        set_thread_res_uid(uid, uid, uid).map_err(failed)?;
    }
    let failed = |e| SandboxError::new("cannot give up capabilities", e, "this is a fault of the kernel's");
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    clear_ambient_capability_set().map_err(failed)?;
    set_capabilities(None, none).map_err(failed)?;
    set_no_new_privs(true).map_err(failed)
}
