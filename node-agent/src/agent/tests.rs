use bedplate_api::node::{DiskMode, RestartPolicy, VmSpec};

use super::*;

fn spec(name: &str) -> VmSpec {
    VmSpec {
        id: VmId::random(),
        name: name.into(),
        image: Digest::ZERO,
        cpus: 1,
        memory_mib: 64,
        disk: DiskMode::Persistent,
        power: Power::Running,
        restart: RestartPolicy::Never,
        cmdline: String::new(),
    }
}

fn refused(vms: Vec<VmSpec>, here: &[VmSpec]) -> Option<String> {
    let here = here.iter().map(|s| (s.id, Vm::new(s.clone()))).collect();
    check(&Desired { generation: 1, vms }, &here).err()
}

#[test]
fn wishes_that_make_no_sense_are_refused_and_the_vm_is_named() {
    let good = spec("web-1");
    assert_eq!(refused(vec![good.clone()], &[]), None);
    let table = [
        (VmSpec { cpus: 0, ..good.clone() }, "0 vCPUs"),
        (VmSpec { cpus: 9, ..good.clone() }, "9 vCPUs"),
        (VmSpec { memory_mib: 1, ..good.clone() }, "1 MiB"),
        (VmSpec { memory_mib: u64::MAX, ..good.clone() }, "MiB"),
        (VmSpec { name: "-x".into(), ..good.clone() }, "\"-x\""),
        (VmSpec { name: "../x".into(), ..good.clone() }, "\"../x\""),
        (VmSpec { name: String::new(), ..good.clone() }, "\"\""),
        (VmSpec { cmdline: "a\nb".into(), ..good.clone() }, "control characters"),
        (VmSpec { disk: DiskMode::NonPersistent, ..good.clone() }, "kind of disk"),
    ];
    for (bad, word) in table {
        let why = refused(vec![bad], std::slice::from_ref(&good)).unwrap_or_default();
        assert!(why.contains(word), "{word}: {why}");
    }
    assert!(refused(vec![good.clone(), good.clone()], &[]).unwrap().contains("id"));
    assert!(refused(vec![good, spec("web-1")], &[]).unwrap().contains("two VMs"));
}

#[test]
fn ids_and_generations_that_others_cannot_tell_apart_or_keep_are_refused() {
    let begins = |last: u128| VmId::from_uuid(uuid::Uuid::from_u128(0x0102_0304_u128 << 96 | last));
    let (one, two) = (VmSpec { id: begins(1), ..spec("one") }, VmSpec { id: begins(1 << 90), ..spec("two") });
    assert!(refused(vec![one.clone(), two.clone()], &[]).unwrap().contains("VM two has an id that begins like"));
    assert!(refused(vec![two], std::slice::from_ref(&one)).unwrap().contains("begins like"));
    let desired = Desired { generation: 1 << 63, vms: vec![one] };
    assert!(check(&desired, &BTreeMap::new()).unwrap_err().contains("too large"));
}
