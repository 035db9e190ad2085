//! For tests: a whole control node on real sockets, images to push to it, and a small node that keeps the contract of
//! [`bedplate_api::node`] over HTTP without running anything.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use bedplate_api::client::{Client, Endpoint, encode_frame};
use bedplate_api::control::{Event, TierSpec};
use bedplate_api::error::ErrorKind;
use bedplate_api::image::{BootData, ImageKind, Manifest, Part};
use bedplate_api::node::{
    Capacity, Desired, DiskMode, Ipv4Net, NodeStatus, Register, Registered, UNFROZEN, VmPhase, VmStatus,
};
use bedplate_api::vmm::{Inspection, RunState};
use bedplate_api::{ApiError, Digest, NodeId};
use bedplate_images::index::Index;
use bedplate_images::{CHUNK_SIZE, Store};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::control::Options;
use crate::serve::{Listen, Serving};

/// Longest wait for anything: far above what it takes, so that only a hang meets it.
const DEADLINE: Duration = Duration::from_secs(60);

pub fn net(text: &str) -> Ipv4Net {
    let (address, prefix) = text.split_once('/').unwrap();
    Ipv4Net { address: address.parse().unwrap(), prefix: prefix.parse().unwrap() }
}

pub fn options(dir: &TempDir) -> Options {
    Options {
        state: dir.path().join("state"),
        node_listen: Some("127.0.0.1:0".parse().unwrap()),
        netboot: None,
        node_network: net("10.77.0.0/24"),
        vm_network: net("10.78.0.0/16"),
        vmm_image: "vmm".into(),
        slots_per_node: 8,
        node_cmdline: "quiet".into(),
        boot_deadline: 300,
        lost_after: 3600,
    }
}

/// A control node and those who talk to it.
pub struct Bench {
    pub serving: Serving,
    pub people: Client,
    pub nodes: Client,
    pub dir: TempDir,
}

impl Bench {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        Self::start_in(dir, options).await
    }

    pub async fn start_in(dir: TempDir, options: Options) -> Self {
        let socket = dir.path().join("control.sock");
        let listen = Listen { socket: socket.clone(), page: Some("127.0.0.1:0".parse().unwrap()) };
        let serving = Serving::start(options, listen).await.unwrap();
        let people = Client::new(Endpoint::Unix(socket), None).unwrap();
        let endpoint = Endpoint::Http(serving.node_address.unwrap().to_string());
        let nodes = Client::new(endpoint, Some(serving.control.token.clone())).unwrap();
        Self { serving, people, nodes, dir }
    }

    /// The same state directory in a new control node.
    pub async fn restart(self) -> Self {
        let options = self.serving.control.options.clone();
        self.serving.stop().await;
        Self::start_in(self.dir, options).await
    }

    /// Pushes an image as a person's command does.
    pub async fn push(&self, name: &str, kind: ImageKind) -> Digest {
        let store = Store::create(self.dir.path().join("local")).unwrap();
        let digest = image(&store, name, kind);
        send(&self.people, &store, &digest).await;
        self.people.tag_image(name, digest).await.unwrap();
        digest
    }

    pub async fn events(&self) -> Vec<Event> {
        self.people.events(0).await.unwrap()
    }
}

/// Waits until `ready` gives something.
pub async fn until<T>(what: &str, mut ready: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = ready().await {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "still waiting for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A small bootable image in `store`, with some zeros in it, called nothing yet.
pub fn image(store: &Store, seed: &str, kind: ImageKind) -> Digest {
    let names: &[&str] = if kind == ImageKind::Disk { &["disk", "kernel", "initrd"] } else { &["kernel", "initrd"] };
    let part = |name: &str| {
        let text = format!("{seed}/{name} ").repeat(12_000);
        let mut bytes = [text.as_bytes(), &vec![0; 2 * CHUNK_SIZE]].concat();
        // Disks consist of sectors.
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let digests: Vec<Digest> = bytes.chunks(CHUNK_SIZE).map(|chunk| store.put_chunk(chunk).unwrap()).collect();
        let size = bytes.len() as u64;
        let index = store.put_blob(&Index::new(size, digests).unwrap().encode()).unwrap();
        (name.to_owned(), Part { size, index, content: size / 2 })
    };
    let boot = BootData { kernel: "kernel".into(), initrd: Some("initrd".into()), cmdline: "root=/dev/vda1".into() };
    let parts = names.iter().map(|name| part(name)).collect();
    store
        .put_manifest(&Manifest {
            schema: 1,
            kind,
            parts,
            boot: Some(boot),
            firmware: None,
            origin: None,
            labels: BTreeMap::new(),
        })
        .unwrap()
}

/// Every chunk that the other side lacks, then the indexes, then the manifest.
pub async fn send(to: &Client, store: &Store, digest: &Digest) {
    for part in store.manifest(digest).unwrap().parts.values() {
        let index = store.blob(&part.index).unwrap();
        let digests = Index::parse(&index).unwrap().digests().to_vec();
        let missing = to.missing_chunks(digests).await.unwrap();
        let frames = missing.iter().map(|d| encode_frame(d, &store.frame(d).unwrap())).collect();
        to.put_chunks(frames).await.unwrap();
        to.put_blob(&part.index, index).await.unwrap();
    }
    to.put_blob(digest, store.blob(digest).unwrap()).await.unwrap();
}

pub fn tier(name: &str, image: &str, target: u32) -> TierSpec {
    TierSpec {
        name: name.into(),
        image: image.into(),
        target,
        cpus: 1,
        memory_mib: 128,
        disk: DiskMode::NonPersistent,
        active: true,
    }
}

/// What a node was told, and how it answers.
#[derive(Default)]
pub struct Heard {
    pub desired: Desired,
    /// Sets that were put, refused ones too.
    pub puts: u32,
    /// So many more puts are refused.
    pub refuse: u32,
    /// VMs of these names cannot run.
    pub fail: Vec<String>,
    /// What it sends as the disk of whichever VM.
    pub disk: Vec<u8>,
}

/// A node without a hypervisor.
pub struct SmallNode {
    pub id: NodeId,
    pub address: SocketAddr,
    pub heard: Arc<Mutex<Heard>>,
    server: JoinHandle<()>,
}

impl Drop for SmallNode {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[derive(Clone)]
struct Small {
    id: NodeId,
    token: String,
    heard: Arc<Mutex<Heard>>,
}

impl SmallNode {
    pub async fn start(token: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let small = Small { id: NodeId::random(), token: token.into(), heard: Arc::default() };
        let (id, heard) = (small.id, Arc::clone(&small.heard));
        let router = Router::new()
            .route("/v1/desired", put(put_desired))
            .route("/v1/vms/{id}/log", get(log))
            .route("/v1/vms/{id}/inspect", get(inspect))
            .route("/v1/vms/{id}/console", get(console))
            .route("/v1/vms/{id}/capture", post(capture))
            .with_state(small);
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { id, address, heard, server }
    }

    pub fn status(&self) -> NodeStatus {
        status(self.id, &self.heard.lock().unwrap())
    }

    pub async fn register(&self, control: &Client, mac: Option<&str>) -> Registered {
        control.register(&self.introduction(mac)).await.unwrap()
    }

    /// What it says to register.
    pub fn introduction(&self, mac: Option<&str>) -> Register {
        Register {
            id: self.id,
            mac: mac.map(str::to_owned),
            address: self.address.ip(),
            port: self.address.port(),
            status: self.status(),
        }
    }

    /// Names of what shall run here.
    pub fn names(&self) -> Vec<String> {
        self.heard.lock().unwrap().desired.vms.iter().map(|vm| vm.name.clone()).collect()
    }
}

fn status(id: NodeId, heard: &Heard) -> NodeStatus {
    let vm = |vm: &bedplate_api::node::VmSpec| {
        let failed = heard.fail.contains(&vm.name);
        VmStatus {
            id: vm.id,
            name: vm.name.clone(),
            phase: if failed { VmPhase::Failed } else { VmPhase::Running },
            detail: failed.then(|| "no such luck".into()),
            address: Some([10, 78, 1, 2].into()),
            address_taken: !failed,
            pid: None,
            restarts: 0,
            copy: None,
        }
    };
    NodeStatus {
        id,
        boot_id: "1".into(),
        version: "0".into(),
        generation: heard.desired.generation,
        capacity: Capacity { cpus: 2, memory_mib: 2048, slots: 4, disk_free: 1 << 30 },
        vms: heard.desired.vms.iter().map(vm).collect(),
        images: Vec::new(),
    }
}

fn refused(kind: ErrorKind) -> Response {
    let status = StatusCode::from_u16(kind.status()).unwrap();
    (status, Json(ApiError::new(kind, "not now"))).into_response()
}

async fn put_desired(State(small): State<Small>, headers: HeaderMap, Json(desired): Json<Desired>) -> Response {
    if headers.get("authorization").and_then(|v| v.to_str().ok()) != Some(&format!("Bearer {}", small.token)) {
        return refused(ErrorKind::Unauthorized);
    }
    let mut heard = small.heard.lock().unwrap();
    heard.puts += 1;
    if heard.refuse > 0 {
        heard.refuse -= 1;
        return refused(ErrorKind::Unavailable);
    }
    if desired.generation < heard.desired.generation {
        return refused(ErrorKind::Conflict);
    }
    heard.desired = desired;
    Json(status(small.id, &heard)).into_response()
}

async fn inspect() -> Json<Inspection> {
    Json(Inspection { state: RunState::Paused, vcpus: Vec::new(), queues: BTreeMap::new() })
}

async fn log(Path(id): Path<String>) -> String {
    format!("log of {id}")
}

async fn capture(State(small): State<Small>) -> Response {
    ([(UNFROZEN, "no agent")], small.heard.lock().unwrap().disk.clone()).into_response()
}

/// Greets, then sends everything back in capitals.
async fn console(mut request: Request) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = hyper_util::rt::TokioIo::new(upgrade.await.unwrap());
        stream.write_all(b"hello ").await.unwrap();
        let mut bytes = [0; 64];
        while let Ok(n @ 1..) = stream.read(&mut bytes).await {
            bytes[..n].make_ascii_uppercase();
            stream.write_all(&bytes[..n]).await.unwrap();
        }
    });
    let headers = [("connection", "upgrade"), ("upgrade", bedplate_api::node::CONSOLE_PROTOCOL)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}
