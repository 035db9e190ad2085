use bedplate_api::VmId;
use bedplate_api::control::TierSpec;
use bedplate_api::node::{Capacity, CopyProgress, DiskMode};

use super::*;

fn view() -> View {
    let vm = |name: &str, slot, phase| VmView {
        id: VmId::random(),
        name: name.into(),
        tier: "web".into(),
        node: "node-1".into(),
        slot,
        phase,
        detail: Some("<script>alert(1)</script>".into()),
        address: Some([10, 78, 1, 2].into()),
        restarts: 0,
        copy: Some(CopyProgress { done: u64::MAX / 2, total: u64::MAX }),
    };
    View {
        nodes: vec![NodeView {
            name: "node-1".into(),
            id: None,
            mac: None,
            address: None,
            state: NodeState::Ready,
            capacity: Some(Capacity { cpus: 2, memory_mib: 4096, slots: 3, disk_free: 0 }),
            slots_used: 2,
            last_seen_seconds: 1,
        }],
        pool: Vec::new(),
        tiers: vec![TierView {
            spec: TierSpec {
                name: "web".into(),
                image: "web".into(),
                target: 4,
                cpus: 1,
                memory_mib: 512,
                disk: DiskMode::NonPersistent,
                active: true,
            },
            digest: bedplate_api::Digest::ZERO,
            assigned: 2,
            running: 1,
            detail: None,
        }],
        vms: vec![vm("web-1", 0, VmPhase::Running), vm("web-2", 2, VmPhase::Copying)],
    }
}

#[test]
fn slots_tiers_and_links_are_there_and_what_guests_say_stays_text() {
    let events = [Event { number: 1, time: 40, subject: "web-1".into(), message: "runs & <b>serves</b>".into() }];
    let page = render(&view(), &events, 100).into_string();
    for part in ["copying 49 %", "width:50%", "width:25%", "http://10.78.1.2/", "60 s", "runs &amp; &lt;b&gt;serves"] {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!(page.matches("<li data-phase").count(), 2);
    assert_eq!(page.matches("li class=\"free\"").count(), 1);
    assert!(!page.contains("<script>alert"));
}

#[test]
fn an_empty_cluster_says_what_to_do() {
    let empty = View { nodes: Vec::new(), pool: Vec::new(), tiers: Vec::new(), vms: Vec::new() };
    let page = render(&empty, &[], 0).into_string();
    assert!(page.contains("bedplate tier create") && page.contains("No machine"));
}
