//! VMs that run before their image is here: the test is the VMM that asks for what it lacks, the VM itself only waits.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use bedplate_api::VmId;
use bedplate_api::node::{VmPhase, VmStatus};
use bedplate_api::vmm::chunks::{Arrival, MAX_WANTED, Note};

use crate::copy::{disk, reported, repository};
use crate::support::{DEADLINE, Node, SLEEP, eventually, image_with, kvm, spec};

/// A VMM's connection to the agent.
struct Vmm(UnixStream);

impl Vmm {
    async fn connect(node: &Node, id: VmId) -> Self {
        let socket = node.vm_dir(id).join("disk/chunks.sock");
        let stream = eventually("the agent serves chunks", async || UnixStream::connect(&socket).ok()).await;
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(stream)
    }

    fn say(&mut self, notes: &[Note]) {
        self.0.write_all(&notes.iter().flat_map(|note| note.encode()).collect::<Vec<_>>()).unwrap();
    }

    fn hear(&mut self) -> Arrival {
        let mut bytes = [0; Arrival::LEN];
        self.0.read_exact(&mut bytes).unwrap();
        Arrival::parse(bytes).unwrap()
    }

    /// Whether the agent has hung up.
    fn is_over(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_runs_before_its_image_is_here_and_gets_what_it_reads() {
    if !kvm() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: VMs on a network of their own take root");
        return;
    }
    let (_dir, control) = repository();
    let digest = image_with(&control.store, &[SLEEP], &disk(300));
    // Enough for a kernel and for what a guest wants; the rest has to wait.
    control.largest.store(8, Ordering::SeqCst);
    let mut node = control.node().await;
    let vm = spec("lazy", digest);
    node.put(1, std::slice::from_ref(&vm)).await;
    let partial = |vm: &VmStatus| vm.phase == VmPhase::Running && vm.copy.is_some_and(|c| c.done < c.total);
    node.until_vm("it runs with a part of its image", vm.id, partial).await;
    let held_up = node.until_vm("people see why", vm.id, |vm| vm.detail.is_some()).await;
    assert!(held_up.detail.as_ref().unwrap().contains("too busy for so much"), "{held_up:?}");
    assert!(node.client().node_status().await.unwrap().images.is_empty());

    let store = node.store();
    let part = store.part(&digest, "disk").unwrap();
    let mut vmm = Vmm::connect(&node, vm.id).await;
    assert!(!part.has(200).unwrap());
    vmm.say(&[Note::Read(7), Note::Wants(200), Note::Read(7), Note::Wants(1 << 60)]);
    assert_eq!(vmm.hear(), Arrival::Refused(1 << 60), "of its own image only");
    assert_eq!(vmm.hear(), Arrival::Here(200));
    assert!(part.has(200).unwrap());
    // Wrong data is not taken for it, and asked for again until it is right.
    control.lies.store(3, Ordering::SeqCst);
    vmm.say(&[Note::Wants(100)]);
    assert_eq!(vmm.hear(), Arrival::Here(100));
    assert_eq!(control.lies.load(Ordering::SeqCst), 0);
    store.read_chunk(&part.digest(100).unwrap(), &mut [0; 1 << 16]).unwrap();
    // What is here and wanted all the same may be damaged.
    let path = |n| {
        let hex = part.digest(n).unwrap().hex();
        node.state().join("images/chunks").join(&hex[..2]).join(hex)
    };
    std::fs::write(path(200), "rotten").unwrap();
    vmm.say(&[Note::Wants(200)]);
    assert_eq!(vmm.hear(), Arrival::Here(200));
    store.read_chunk(&part.digest(200).unwrap(), &mut [0; 1 << 16]).unwrap();
    // The source is away; more is wanted than may be, and all of it comes when it is back.
    control.largest.store(0, Ordering::SeqCst);
    let many: Vec<Note> = (0..MAX_WANTED as u64).map(|n| Note::Wants(n * 2)).collect();
    vmm.say(&many);
    control.largest.store(usize::MAX, Ordering::SeqCst);
    let mut here: Vec<Arrival> = many.iter().map(|_| vmm.hear()).collect();
    here.sort_by_key(|arrival| {
        let (Arrival::Here(number) | Arrival::Refused(number)) = *arrival;
        number
    });
    assert_eq!(here, (0..MAX_WANTED as u64).map(|n| Arrival::Here(n * 2)).collect::<Vec<_>>());

    // What this boot has read is told to the control node.
    drop(vmm);
    let mut order = control.order.subscribe();
    let told =
        tokio::time::timeout(DEADLINE, order.wait_for(|order| !order.is_empty())).await.unwrap().unwrap().clone();
    assert_eq!(told[..4], [7, 200, 100, 0]);
    // What makes no sense ends the conversation.
    let mut hostile = Vmm::connect(&node, vm.id).await;
    hostile.0.write_all(&[0xff; Note::LEN]).unwrap();
    assert!(hostile.is_over());
    reported(&control, |s| s.images.contains(&digest)).await;
    store.verify(&digest).unwrap();
    let whole = node.until_vm("nothing is left to copy", vm.id, |vm| vm.copy.is_none()).await;
    assert_eq!((whole.detail, whole.restarts), (None, 0));
    node.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_goes_on_with_a_partial_image() {
    if !kvm() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: VMs on a network of their own take root");
        return;
    }
    let (_dir, control) = repository();
    let digest = image_with(&control.store, &[SLEEP], &disk(300));
    control.largest.store(8, Ordering::SeqCst);
    let mut node = control.node().await;
    let vm = spec("lazy", digest);
    node.put(1, std::slice::from_ref(&vm)).await;
    let before = node.until_phase(vm.id, VmPhase::Running).await;
    control.largest.store(0, Ordering::SeqCst);
    let mut vmm = Vmm::connect(&node, vm.id).await;
    vmm.say(&[Note::Wants(250)]);
    node.kill();
    assert!(vmm.is_over());
    node.start().await;
    let partial = |vm: &VmStatus| vm.phase == VmPhase::Running && vm.copy.is_some_and(|c| c.done < c.total);
    let after = node.until_vm("it is known to be partial", vm.id, partial).await;
    assert_eq!((after.pid, after.restarts), (before.pid, 0));
    let mut vmm = Vmm::connect(&node, vm.id).await;
    vmm.say(&[Note::Wants(250)]);
    control.largest.store(8, Ordering::SeqCst);
    assert_eq!(vmm.hear(), Arrival::Here(250));
    control.largest.store(usize::MAX, Ordering::SeqCst);
    reported(&control, |s| s.images.contains(&digest)).await;
    node.store().verify(&digest).unwrap();
}
