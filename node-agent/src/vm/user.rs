//! Whom a VMM becomes before its guest runs.

use bedplate_api::VmId;

/// Users from here on are VMs: beyond what distributions and container engines hand out.
const FIRST: u32 = 0x7000_0000;
/// How many there are.
const COUNT: u128 = 0x0fff_0000;

/// The user, and group, of VM `id`, the same each time. Two VMs of one node share one by accident only. None where this
/// agent is not root: then its VMMs are who it is.
pub fn of(id: VmId) -> Option<u32> {
    rustix::process::geteuid().is_root().then(|| number(id))
}

fn number(id: VmId) -> u32 {
    let offset = id.as_uuid().as_u128() % COUNT;
    FIRST + u32::try_from(offset).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vm_has_a_user_of_its_own() {
        let id = VmId::random();
        assert_eq!(number(id), number(id));
        assert!((FIRST..FIRST + 0x0fff_0000).contains(&number(id)));
        assert_ne!(number(id), number(VmId::random()));
    }
}
