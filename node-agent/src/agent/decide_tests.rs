use bedplate_api::node::{DiskMode, RestartPolicy};

use super::*;
use crate::agent::model::Process;

const IMAGE: Digest = Digest::from_bytes([1; 32]);
const NOW: Millis = Millis(1_000_000);
const PROCESS: Process = Process { pid: 77, start_ticks: 5 };

fn id(n: u8) -> VmId {
    VmId::from_uuid(uuid::Uuid::from_bytes([n; 16]))
}

fn spec(n: u8) -> VmSpec {
    VmSpec {
        id: id(n),
        name: format!("vm-{n}"),
        image: IMAGE,
        cpus: 1,
        memory_mib: 512,
        disk: DiskMode::NonPersistent,
        power: Power::Running,
        restart: RestartPolicy::Always,
        cmdline: String::new(),
    }
}

fn off(n: u8) -> VmSpec {
    VmSpec { power: Power::Stopped, ..spec(n) }
}

fn running() -> Step {
    Step::Running { process: PROCESS, since: Millis(0) }
}

fn stopping(asked: Asked, ago: u64) -> Step {
    Step::Stopping { process: PROCESS, asked, since: Millis(NOW.0 - ago) }
}

struct Scene {
    desired: Desired,
    vms: BTreeMap<VmId, Vm>,
    images: BTreeMap<Digest, ImageState>,
    complete: Vec<Digest>,
    host: Host,
    leaving: bool,
}

/// A node with 4 slots and 4 GiB, the image here, `desired` asked for at generation 9, and `vms` on it.
fn scene(desired: &[VmSpec], vms: &[(VmSpec, Step)]) -> Scene {
    let vms = vms.iter().map(|(s, step)| (s.id, Vm { step: step.clone(), ..Vm::new(s.clone()) })).collect();
    Scene {
        desired: Desired { generation: 9, vms: desired.to_vec() },
        vms,
        images: [(IMAGE, ImageState::Ready)].into(),
        complete: vec![IMAGE],
        host: Host { slots: 4, memory_mib: 4096, cpus: 2, obstacle: None, not_yet: None, button_millis: 20_000 },
        leaving: false,
    }
}

impl Scene {
    fn decide(&self) -> Decision {
        decide(&World {
            desired: &self.desired,
            vms: &self.vms,
            images: &self.images,
            complete: &self.complete,
            host: &self.host,
            now: NOW,
            leaving: self.leaving,
        })
    }

    fn actions(&self) -> Vec<Action> {
        self.decide().actions
    }
}

#[test]
fn one_vm_in_every_step_with_every_wish() {
    use Action::{Accept, Remove, Rouse, Start, Stop, TurnOff};
    let refused = |generation| Step::Refused { generation };
    let back_off = |until| Step::BackOff { until: Millis(until) };
    type Row = (&'static str, Vec<VmSpec>, Option<Step>, Vec<Action>);
    let table: Vec<Row> = vec![
        ("new", vec![spec(1)], None, vec![Accept(spec(1))]),
        ("new and off", vec![off(1)], None, vec![Accept(off(1))]),
        ("ready", vec![spec(1)], Some(Step::Ready), vec![Start(id(1))]),
        ("starting", vec![spec(1)], Some(Step::Starting), vec![]),
        ("runs", vec![spec(1)], Some(running()), vec![]),
        ("was off", vec![spec(1)], Some(Step::Off), vec![Rouse(id(1))]),
        ("ended by itself", vec![spec(1)], Some(Step::Ended), vec![]),
        ("refused now", vec![spec(1)], Some(refused(9)), vec![]),
        ("refused before", vec![spec(1)], Some(refused(8)), vec![Rouse(id(1))]),
        ("backs off", vec![spec(1)], Some(back_off(NOW.0 + 1)), vec![]),
        ("backed off", vec![spec(1)], Some(back_off(NOW.0)), vec![Rouse(id(1))]),
        ("wanted again while it stops", vec![spec(1)], Some(stopping(Asked::Button, 19_999)), vec![]),
        ("wanted again, deaf", vec![spec(1)], Some(stopping(Asked::Button, 20_000)), vec![Stop(id(1), Asked::Stop)]),
        ("off, ready", vec![off(1)], Some(Step::Ready), vec![TurnOff(id(1))]),
        ("off, ended", vec![off(1)], Some(Step::Ended), vec![TurnOff(id(1))]),
        ("off, off", vec![off(1)], Some(Step::Off), vec![]),
        ("off, starting", vec![off(1)], Some(Step::Starting), vec![]),
        ("off, runs", vec![off(1)], Some(running()), vec![Stop(id(1), Asked::Button)]),
        ("gone, runs", vec![], Some(running()), vec![Stop(id(1), Asked::Button)]),
        ("gone, asked", vec![], Some(stopping(Asked::Button, 19_999)), vec![]),
        ("gone, button ignored", vec![], Some(stopping(Asked::Button, 20_000)), vec![Stop(id(1), Asked::Stop)]),
        ("gone, stop ignored", vec![], Some(stopping(Asked::Stop, 3_000)), vec![Stop(id(1), Asked::Kill)]),
        ("gone, kill takes long", vec![], Some(stopping(Asked::Kill, 5_000)), vec![Stop(id(1), Asked::Kill)]),
        ("gone, starting", vec![], Some(Step::Starting), vec![]),
        ("gone, refused", vec![], Some(refused(9)), vec![Remove(id(1))]),
        ("gone, off", vec![], Some(Step::Off), vec![Remove(id(1))]),
        ("gone, removing", vec![], Some(Step::Removing), vec![]),
    ];
    for (what, desired, step, expected) in table {
        let here = desired.first().cloned().unwrap_or_else(|| spec(1));
        let vms: Vec<_> = step.into_iter().map(|step| (here.clone(), step)).collect();
        assert_eq!(scene(&desired, &vms).actions(), expected, "{what}");
    }
}

#[test]
fn a_changed_wish_is_noted_and_acted_upon() {
    let actions = scene(&[off(1)], &[(spec(1), running())]).actions();
    assert_eq!(actions, [Action::Respec(off(1)), Action::Stop(id(1), Asked::Button)]);
}

#[test]
fn time_alone_wakes_when_something_is_due() {
    let stop = scene(&[], &[(spec(1), stopping(Asked::Button, 5_000))]).decide();
    assert_eq!(stop.wake, Some(NOW.plus(15_000)));
    let wait = scene(&[spec(1)], &[(spec(1), Step::BackOff { until: NOW.plus(7) })]).decide();
    assert_eq!(wait.wake, Some(NOW.plus(7)));
    assert_eq!(scene(&[spec(1)], &[(spec(1), running())]).decide().wake, None);
}

#[test]
fn an_image_is_fetched_once_for_all_and_dropped_when_nobody_asks() {
    let ready = [(spec(1), Step::Ready), (spec(2), Step::Ready)];
    let mut scene = scene(&[spec(1), spec(2)], &ready);
    scene.images.clear();
    assert_eq!(scene.actions(), [Action::Fetch(IMAGE)]);
    scene.images.insert(IMAGE, ImageState::Copying { progress: None, trouble: None });
    assert_eq!(scene.actions(), []);
    scene.desired.vms.clear();
    assert!(scene.actions().contains(&Action::Drop(IMAGE)));
    scene.images.insert(IMAGE, ImageState::Ready);
    assert!(!scene.actions().contains(&Action::Drop(IMAGE)), "what is complete stays for the next VM");
}

#[test]
fn an_image_that_failed_refuses_its_vms_until_the_wishes_change() {
    let mut scene = scene(&[spec(1)], &[(spec(1), Step::Ready)]);
    scene.images.insert(IMAGE, ImageState::Failed { detail: "not found".into(), generation: 9 });
    assert_eq!(scene.actions(), [Action::Refuse(id(1), "not found".into())]);
    scene.desired.generation = 10;
    assert_eq!(scene.actions(), [Action::Drop(IMAGE)]);
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let big = VmSpec { memory_mib: 3000, ..spec(2) };
    let two = scene(&[spec(1), big.clone()], &[(spec(1), running()), (big.clone(), Step::Ready)]);
    assert_eq!(two.actions(), [Action::Start(id(2))]);
    // A VM that runs keeps its place though it stands last.
    let three =
        scene(&[spec(3), big.clone(), spec(1)], &[(spec(1), running()), (big, Step::Ready), (spec(3), Step::Ready)]);
    let actions = three.actions();
    assert_eq!(actions[0], Action::Start(id(3)));
    let Action::Refuse(who, why) = &actions[1] else { panic!("{actions:?}") };
    assert_eq!(*who, id(2));
    for number in ["3032 MiB", "2752 MiB are left", "4096 MiB"] {
        assert!(why.contains(number), "{why}");
    }
    let mut many = scene(&[spec(1)], &[(spec(1), Step::Ready)]);
    many.host.slots = 0;
    assert!(matches!(&many.actions()[..], [Action::Refuse(_, why)] if why.contains("0 VMs")));
    many.host.slots = 1;
    many.desired.vms[0].cpus = 3;
    assert!(matches!(&many.actions()[1..], [Action::Refuse(_, why)] if why.contains("3 vCPUs")));
    many.host.obstacle = Some("no /dev/kvm".into());
    assert!(matches!(&many.actions()[1..], [Action::Refuse(_, why)] if why == "no /dev/kvm"));
}

#[test]
fn a_start_waits_for_the_memory_of_a_vm_on_its_way_out() {
    let big = |n| VmSpec { memory_mib: 3000, ..spec(n) };
    let vms = [(big(1), stopping(Asked::Button, 0)), (big(2), Step::Ready)];
    let mut scene = scene(&[big(2)], &vms);
    let actions = scene.actions();
    assert!(matches!(&actions[..], [Action::Hold(who, _)] if *who == id(2)), "{actions:?}");
    scene.vms.remove(&id(1));
    assert_eq!(scene.actions(), [Action::Start(id(2))]);
}

#[test]
fn a_start_waits_for_the_network() {
    let mut scene = scene(&[spec(1)], &[(spec(1), Step::Ready)]);
    scene.host.not_yet = Some("network".into());
    assert_eq!(scene.actions(), [Action::Hold(id(1), "network".into())]);
    scene.vms.values_mut().for_each(|vm| vm.detail = Some("network".into()));
    assert_eq!(scene.actions(), [], "the same is not noted twice");
}

#[test]
fn a_machine_that_goes_down_stops_everything_and_removes_nothing() {
    let mut scene = scene(&[spec(1), spec(3)], &[(spec(1), running()), (spec(2), Step::Off)]);
    scene.leaving = true;
    assert_eq!(scene.actions(), [Action::Stop(id(1), Asked::Button)]);
}

#[test]
fn a_start_needs_a_part_of_its_image_and_the_rest_follows_whoever_began_it() {
    let partial = ImageState::Partial { progress: None, trouble: Some("the line is down".to_owned()) };
    let mut scene = scene(&[spec(1), spec(2)], &[(spec(1), Step::Ready), (spec(2), running())]);
    scene.complete.clear();
    scene.images = [(IMAGE, partial)].into();
    assert_eq!(scene.actions(), [Action::Start(id(1))]);
    // An agent that was started anew knows nothing of the copy, and of both VMs runs one.
    scene.images.clear();
    assert_eq!(scene.actions(), [Action::Fetch(IMAGE)]);
    scene.vms.insert(id(1), Vm { step: running(), ..Vm::new(spec(1)) });
    assert_eq!(scene.actions(), [Action::Fetch(IMAGE)], "once");
    scene.complete = vec![IMAGE];
    assert!(scene.actions().is_empty());
    scene.desired.vms.clear();
    scene.images = [(IMAGE, ImageState::Partial { progress: None, trouble: None })].into();
    assert!(scene.actions().contains(&Action::Drop(IMAGE)), "nobody wants the rest");
}
