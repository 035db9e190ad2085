//! Images from a control node: a repository over a store, which answers as the control node's does, and can break off.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bedplate_api::client::encode_frame;
use bedplate_api::error::ErrorKind;
use bedplate_api::image::{BootOrder, ChunkList, Locate, Located, PeerChunks};
use bedplate_api::node::{Ipv4Net, NodeStatus, Power, Register, Registered, VmPhase, VmStatus};
use bedplate_api::{ApiError, Digest};
use bedplate_images::Store;
use tokio::sync::watch;

use crate::support::{DEADLINE, Node, SLEEP, eventually, image_with, kvm, spec};

/// What the control node of a test knows and does.
#[derive(Clone)]
pub struct Control {
    pub store: Store,
    /// Requests for chunks that break off in the middle of a frame before one is served whole.
    breaks: Arc<AtomicUsize>,
    /// Requests for chunks so far.
    pub fetches: Arc<AtomicUsize>,
    /// Bytes of blobs and chunks, and how many chunks, that were given out so far.
    pub sent: Arc<AtomicU64>,
    pub sent_chunks: Arc<AtomicU64>,
    registered: watch::Sender<usize>,
    reported: watch::Sender<Option<NodeStatus>>,
    /// Reports are answered with "not found", once.
    forget: Arc<AtomicUsize>,
    /// Requests for more chunks than this are refused.
    pub largest: Arc<AtomicUsize>,
    /// So many chunks are still sent under the name of others.
    pub lies: Arc<AtomicUsize>,
    /// What a boot reads, as a node has told it.
    pub order: watch::Sender<Vec<u64>>,
    /// Who nodes are told has everything that they ask for.
    pub peer: Arc<Mutex<Option<SocketAddr>>>,
    /// While this is true, requests for chunks wait.
    pub held: watch::Sender<bool>,
}

impl Control {
    fn new(store: Store) -> Self {
        Self {
            store,
            breaks: Arc::default(),
            fetches: Arc::default(),
            sent: Arc::default(),
            sent_chunks: Arc::default(),
            registered: watch::Sender::new(0),
            reported: watch::Sender::new(None),
            forget: Arc::default(),
            largest: Arc::new(AtomicUsize::new(usize::MAX)),
            lies: Arc::default(),
            order: watch::Sender::new(Vec::new()),
            peer: Arc::default(),
            held: watch::Sender::new(false),
        }
    }

    /// Serves from now on. Returns where.
    pub async fn serve(&self) -> String {
        let routes = Router::new()
            .route("/v1/blobs/{digest}", get(blob))
            .route("/v1/chunks/fetch", post(chunks))
            .route("/v1/chunks/check", post(check))
            .route("/v1/chunks/locate", post(locate))
            .route("/v1/orders/{digest}", get(order).put(put_order))
            .route("/v1/nodes/register", post(register))
            .route("/v1/nodes/{id}/status", post(report))
            .with_state(self.clone());
        let path = self.store.dir().with_file_name("control.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        format!("unix:{}", path.display())
    }

    pub async fn node(&self) -> Node {
        let url = self.serve().await;
        let listen = ["--listen", "0.0.0.0:0", "--token", "00ff", "--vm-network", "10.99.0.0/29"];
        Node::running(&[["--control", &url].as_slice(), &listen].concat()).await
    }
}

fn refuse(kind: ErrorKind, message: &str) -> Response {
    let status = StatusCode::from_u16(kind.status()).unwrap();
    (status, Json(ApiError::new(kind, message))).into_response()
}

async fn blob(State(control): State<Control>, Path(digest): Path<String>) -> Response {
    match control.store.blob(&digest.parse().unwrap()) {
        Ok(bytes) => {
            control.sent.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            bytes.into_response()
        }
        Err(_) => refuse(ErrorKind::NotFound, "no such blob"),
    }
}

async fn chunks(State(control): State<Control>, Json(list): Json<ChunkList>) -> Response {
    if list.digests.len() > control.largest.load(Ordering::SeqCst) {
        return refuse(ErrorKind::Unavailable, "too busy for so much");
    }
    control.fetches.fetch_add(1, Ordering::SeqCst);
    control.held.subscribe().wait_for(|held| !held).await.unwrap();
    if let Some(first) = control.store.missing(&list.digests).first() {
        return refuse(ErrorKind::NotFound, &format!("{first} is not here"));
    }
    let lies = |_: &Digest| control.lies.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
    let frame = |d: &Digest| {
        let other = lies(d).then(|| control.store.put_chunk(b"another chunk").unwrap());
        let mut frame = Vec::new();
        control.store.append_frame(&other.unwrap_or(*d), &mut frame).unwrap();
        frame
    };
    let mut wire: Vec<Result<Bytes, std::io::Error>> =
        list.digests.iter().map(|d| Ok(encode_frame(d, &frame(d)))).collect();
    let bytes: usize = wire.iter().flatten().map(Bytes::len).sum();
    control.sent.fetch_add(bytes as u64, Ordering::SeqCst);
    control.sent_chunks.fetch_add(wire.len() as u64, Ordering::SeqCst);
    if control.breaks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
        let half = wire.len() / 2;
        let cut = wire[half].as_ref().unwrap().slice(..10);
        wire.truncate(half);
        wire.push(Ok(cut));
        wire.push(Err(std::io::Error::other("the line is cut")));
    }
    Body::from_stream(futures_util::stream::iter(wire)).into_response()
}

async fn check(State(control): State<Control>, Json(list): Json<ChunkList>) -> Response {
    match list.digests.iter().try_for_each(|digest| control.store.check_chunk(digest)) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(e) => refuse(ErrorKind::NotFound, &e.to_string()),
    }
}

async fn locate(State(control): State<Control>, Json(ask): Json<Locate>) -> Json<Located> {
    let peer = *control.peer.lock().unwrap();
    Json(Located { peers: peer.map(|address| PeerChunks { address, digests: ask.digests }).into_iter().collect() })
}

async fn order(State(control): State<Control>) -> Json<BootOrder> {
    Json(BootOrder { chunks: control.order.borrow().clone() })
}

async fn put_order(State(control): State<Control>, Json(order): Json<BootOrder>) -> StatusCode {
    control.order.send_replace(order.chunks);
    StatusCode::NO_CONTENT
}

async fn register(State(control): State<Control>, Json(_): Json<Register>) -> Json<Registered> {
    control.registered.send_modify(|n| *n += 1);
    let vm_network = Ipv4Net { address: [10, 99, 0, 0].into(), prefix: 29 };
    Json(Registered { name: "node-1".into(), vm_network, report_seconds: 60 })
}

async fn report(State(control): State<Control>, Json(status): Json<NodeStatus>) -> Response {
    control.reported.send_replace(Some(status));
    if control.forget.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
        return refuse(ErrorKind::NotFound, "who are you?");
    }
    StatusCode::NO_CONTENT.into_response()
}

/// Bytes that differ from chunk to chunk.
pub fn disk(chunks: usize) -> Vec<u8> {
    (0..chunks).flat_map(|n| [(n % 251) as u8 + 1, (n / 251) as u8].into_iter().cycle().take(64 << 10)).collect()
}

pub fn repository() -> (tempfile::TempDir, Control) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("store")).unwrap();
    (dir, Control::new(store))
}

/// Waits until a report satisfies `test`.
pub async fn reported(control: &Control, test: impl FnMut(&NodeStatus) -> bool) -> NodeStatus {
    let mut test = test;
    let mut reports = control.reported.subscribe();
    let wait = reports.wait_for(|status| status.as_ref().is_some_and(&mut test));
    let status = tokio::time::timeout(DEADLINE, wait).await.expect("a report comes in time").unwrap();
    status.clone().unwrap()
}

#[tokio::test]
async fn an_image_is_copied_whole_though_the_line_breaks_and_the_control_node_hears_of_it() {
    let (_dir, control) = repository();
    let digest = image_with(&control.store, &[SLEEP], &disk(300));
    control.breaks.store(3, Ordering::SeqCst);
    let node = control.node().await;
    let vm = spec("one", digest);
    node.put(1, std::slice::from_ref(&vm)).await;
    let status = reported(&control, |s| s.images.contains(&digest)).await;
    assert_eq!(status.generation, 1);
    let store = node.store();
    store.verify(&digest).unwrap();
    if kvm() && rustix::process::geteuid().is_root() {
        let running = node.until_phase(vm.id, VmPhase::Running).await;
        assert_eq!((running.address, running.address_taken), (Some([10, 99, 0, 2].into()), false));
    }
    assert_eq!(store.tags().unwrap().len(), 1, "a complete image is named, so that it stays");
    // The kernel and 5 batches of 64 chunks, 3 of which were asked for again: what had landed was not.
    assert!(control.fetches.load(Ordering::SeqCst) <= 6 + 3 + 3, "{:?}", control.fetches);

    // The next image differs in one chunk, and that is all that is fetched for it, with its kernel the same.
    let mut changed = disk(300);
    changed[0] ^= 0xff;
    let next = image_with(&control.store, &[SLEEP], &changed);
    let before = control.fetches.load(Ordering::SeqCst);
    node.put(2, &[spec("two", next)]).await;
    reported(&control, |s| s.images.contains(&next)).await;
    assert_eq!(control.fetches.load(Ordering::SeqCst), before + 1);
}

/// Flips a bit of chunk `digest` in its file, and returns that and what it should be.
pub fn damage(store: &Store, digest: &Digest) -> (PathBuf, Vec<u8>) {
    let hex = digest.hex();
    let path = store.dir().join("chunks").join(&hex[..2]).join(&hex);
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    (path, whole)
}

#[tokio::test]
async fn a_chunk_that_rotted_in_the_repository_is_named_and_awaited() {
    // Without KVM nothing is copied for VMs that could not run.
    if !kvm() {
        return;
    }
    let (_dir, control) = repository();
    let digest = image_with(&control.store, &[SLEEP], &disk(100));
    let manifest = control.store.manifest(&digest).unwrap();
    let chunk = control.store.index(&manifest.parts["disk"]).unwrap().digest(70).unwrap();
    let (path, whole) = damage(&control.store, &chunk);
    let node = control.node().await;
    node.put(1, &[spec("one", digest)]).await;
    let names = [digest.to_string(), chunk.to_string(), path.display().to_string()];
    let named = |line: &str| names.iter().all(|name| line.contains(name)) && line.contains("came damaged from unix:");
    eventually("the agent says what is damaged, and where", async || node.log().lines().any(named).then_some(())).await;
    assert!(!path.exists(), "the repository has set it aside");
    assert!(!node.store().has_chunk(&chunk));
    assert!(node.client().node_status().await.unwrap().images.is_empty());

    control.store.put_frame(&chunk, &whole).unwrap();
    reported(&control, |s| s.images.contains(&digest)).await;
    node.store().verify(&digest).unwrap();
}

#[tokio::test]
async fn an_unknown_image_fails_and_its_vm_can_be_asked_for_again() {
    let (_dir, control) = repository();
    let node = control.node().await;
    let vm = spec("one", Digest::from_bytes([5; 32]));
    node.put(1, std::slice::from_ref(&vm)).await;
    let failed = node.until_phase(vm.id, VmPhase::Failed).await;
    let reason = failed.detail.unwrap();
    assert!(reason.contains("not in the repository") || reason.contains("/dev/kvm"), "{reason}");
    node.put(2, &[]).await;
    node.until("it is gone", |s| s.vms.is_empty()).await;
}

#[tokio::test]
async fn a_copy_that_nobody_wants_any_more_ends() {
    let (_dir, control) = repository();
    let digest = image_with(&control.store, &[SLEEP], &disk(100));
    control.breaks.store(usize::MAX, Ordering::SeqCst);
    let node = control.node().await;
    let vm = spec("one", digest);
    node.put(1, std::slice::from_ref(&vm)).await;
    let held_up = node.until_vm("it says what holds it up", vm.id, |v| v.detail.is_some()).await;
    if held_up.phase == VmPhase::Copying {
        assert!(held_up.detail.unwrap().contains("the next try is in"), "and what comes next");
        assert!(held_up.copy.is_some());
    }
    let mut off = vm.clone();
    off.power = Power::Stopped;
    node.put(2, std::slice::from_ref(&off)).await;
    node.until_phase(vm.id, VmPhase::Stopped).await;
    node.put(3, &[]).await;
    node.until("it is gone", |s| s.vms.is_empty()).await;
}

#[tokio::test]
async fn a_control_node_that_forgot_the_node_gets_a_registration() {
    let (_dir, control) = repository();
    control.forget.store(1, Ordering::SeqCst);
    let _node = control.node().await;
    let mut registered = control.registered.subscribe();
    let wait = registered.wait_for(|n| *n == 2);
    tokio::time::timeout(DEADLINE, wait).await.expect("it registers again").unwrap();
    reported(&control, |s| s.capacity.slots == 8).await;
}

/// Bytes that nothing can compress, the same each time.
fn noise(chunks: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..chunks << 16).map(|_| next()).collect()
}

async fn a_full_disk() {
    let (_dir, control) = repository();
    let small = image_with(&control.store, &[SLEEP], &disk(3));
    let big = image_with(&control.store, &[SLEEP], &noise(200));
    let url = control.serve().await;
    let listen = ["--listen", "0.0.0.0:0", "--token", "00ff", "--vm-network", "10.99.0.0/29"];
    let mut node = Node::new(&[["--control", &url].as_slice(), &listen].concat());
    // A copy leaves 64 MiB free.
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=80m", "tmpfs"]).arg(node.state()).status();
    assert!(mount.unwrap().success());
    node.start().await;

    let vms = [spec("small", small), spec("big", big)];
    node.put(1, &vms[..1]).await;
    reported(&control, |s| s.images.contains(&small)).await;
    // While the line is down somebody else fills the disk.
    control.breaks.store(usize::MAX, Ordering::SeqCst);
    node.put(2, &vms).await;
    node.until_vm("the copy is held up", vms[1].id, |v| v.detail.is_some()).await;
    let hog = node.state().join("hog");
    std::fs::write(&hog, vec![1; 80 << 20]).unwrap_err();
    // It may run already, since what a start needs was here before: what it lacks is said all the same.
    let told = |v: &VmStatus| v.detail.as_deref().is_some_and(|why| why.contains("free some space"));
    node.until_vm("somebody says that there is no room", vms[1].id, told).await;
    // It took nothing from the others, and half an image is no image.
    let status = node.client().node_status().await.unwrap();
    assert_eq!(status.images, [small]);
    node.store().verify(&small).unwrap();

    std::fs::remove_file(&hog).unwrap();
    control.breaks.store(0, Ordering::SeqCst);
    node.put(3, &vms).await;
    reported(&control, |s| s.images.contains(&big)).await;
    node.store().verify(&big).unwrap();
}

#[test]
fn a_disk_that_fills_up_during_a_copy_is_named_and_harms_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounting a small file system takes root");
        return;
    }
    // Without KVM nothing is copied for VMs that could not run.
    if !kvm() {
        return;
    }
    let alone = || {
        use rustix::mount::{MountPropagationFlags, mount_change};
        // SAFETY: only this thread's view of mounts and its working directory change; no descriptor or memory is shared anew.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(a_full_disk());
    };
    std::thread::spawn(alone).join().unwrap();
}
