//! A node agent as a process over a directory of its own, guests of a few instructions, and waits with deadlines.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bedplate_api::client::{Client, Endpoint};
use bedplate_api::image::{BootData, ImageKind, Manifest, Part};
use bedplate_api::node::{Desired, DiskMode, NodeStatus, Power, RestartPolicy, VmPhase, VmSpec, VmStatus};
use bedplate_api::{Digest, VmId};
use bedplate_images::index::Index;
use bedplate_images::{CHUNK_SIZE, Store};
use bedplate_node::vm::process;
use rustix::thread::UnshareFlags;

/// Long enough for a machine that does ten other things.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// `mov al, 'x'; mov dx, 0x3f8; out dx, al`
pub const SAY_X: &[u8] = &[0xb0, b'x', 0x66, 0xba, 0xf8, 0x03, 0xee];
/// `hlt; jmp` back to it: takes no time of the host.
pub const SLEEP: &[u8] = &[0xf4, 0xeb, 0xfd];
/// `mov al, 0xfe; out 0x64, al`: reset by the keyboard controller.
pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];
/// Waits until the power button's bit is in the ACPI event register.
pub const AWAIT_BUTTON: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9];
/// Powers off by the ACPI control register.
pub const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];

/// An ELF kernel that is `code`, at 1 MiB, entered in 64-bit mode.
fn kernel(code: &[&[u8]]) -> Vec<u8> {
    let code = code.concat();
    let mut image = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    for (at, value) in [(16, 2u16), (18, 62), (54, 56), (56, 1)] {
        put(at, &value.to_le_bytes());
    }
    put(64, &1u32.to_le_bytes());
    let len = code.len() as u64;
    for (at, value) in [(24, 0x10_0000u64), (32, 64), (72, 0x1000), (88, 0x10_0000), (96, len), (104, len)] {
        put(at, &value.to_le_bytes());
    }
    image.extend_from_slice(&code);
    image
}

fn part(store: &Store, bytes: &[u8]) -> Part {
    let digests = bytes.chunks(CHUNK_SIZE).map(|chunk| store.put_chunk(chunk).unwrap()).collect();
    let index = Index::new(bytes.len() as u64, digests).unwrap();
    Part { size: bytes.len() as u64, index: store.put_blob(&index.encode()).unwrap(), content: bytes.len() as u64 }
}

/// An image in `store` whose kernel is `code` and whose disk is `disk`.
pub fn image_with(store: &Store, code: &[&[u8]], disk: &[u8]) -> Digest {
    let manifest = Manifest {
        schema: 1,
        kind: ImageKind::Disk,
        parts: [("disk".to_owned(), part(store, disk)), ("kernel".to_owned(), part(store, &kernel(code)))].into(),
        boot: Some(BootData { kernel: "kernel".to_owned(), initrd: None, cmdline: "quiet".to_owned() }),
        firmware: None,
        origin: None,
        labels: Default::default(),
    };
    store.put_manifest(&manifest).unwrap()
}

/// An image whose disk is a megabyte of zeros.
pub fn image(store: &Store, code: &[&[u8]]) -> Digest {
    image_with(store, code, &vec![0; 1 << 20])
}

pub fn spec(name: &str, image: Digest) -> VmSpec {
    VmSpec {
        id: VmId::random(),
        name: name.to_owned(),
        image,
        cpus: 1,
        memory_mib: 32,
        disk: DiskMode::NonPersistent,
        power: Power::Running,
        restart: RestartPolicy::Always,
        cmdline: String::new(),
    }
}

/// The VMM beside our own program, built if nobody did yet.
fn vmm() -> PathBuf {
    if let Some(path) = std::env::var_os("BEDPLATE_VMM") {
        return path.into();
    }
    let vmm = Path::new(env!("CARGO_BIN_EXE_bedplate-node")).with_file_name("bedplate-vmm");
    if !vmm.exists() {
        let built = Command::new(env!("CARGO")).args(["build", "--release", "--package", "bedplate-vmm"]).status();
        assert!(built.unwrap().success() && vmm.exists(), "{} could not be built", vmm.display());
    }
    vmm
}

/// Whether guests of a few instructions run here; says so where they do not.
pub fn kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("skipped: no usable /dev/kvm; the lab tests run VMs on emulated nodes");
    }
    there
}

/// An agent over a state directory. Whatever it started ends with it.
pub struct Node {
    dir: tempfile::TempDir,
    more_args: Vec<String>,
    agent: Option<Child>,
    /// It shares the network of the thread that starts it.
    on_our_network: bool,
}

impl Node {
    /// A node whose agent does not run yet; `more_args` beside those that every test needs.
    pub fn new(more_args: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("bpn-").tempdir().unwrap();
        Self { dir, more_args: more_args.iter().map(|a| (*a).to_owned()).collect(), agent: None, on_our_network: false }
    }

    /// The same, and its agent can be reached from the calling thread's network, which is a test's own.
    pub fn reachable(more_args: &[&str]) -> Self {
        let mut node = Self::new(more_args);
        node.on_our_network = true;
        node
    }

    /// A node whose agent runs.
    pub async fn running(more_args: &[&str]) -> Self {
        let mut node = Self::new(more_args);
        node.start().await;
        node
    }

    pub fn state(&self) -> &Path {
        self.dir.path()
    }

    pub fn store(&self) -> Store {
        Store::create(self.state().join("images")).unwrap()
    }

    pub fn vm_dir(&self, id: VmId) -> PathBuf {
        self.state().join("vms").join(id.to_string())
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate-node"));
        command.args(["agent", "--stop-seconds", "1", "--state"]).arg(self.state());
        if !self.more_args.iter().any(|a| a == "--vmm") {
            command.arg("--vmm").arg(vmm());
        }
        command.args(&self.more_args).stdin(Stdio::null());
        let makes_links = self.more_args.iter().any(|a| a == "--vm-network") && !self.on_our_network;
        if makes_links && rustix::process::geteuid().is_root() {
            // A bridge and taps are made: in a network of the agent's own, which is gone when it and its VMs are.
            // SAFETY: one system call between fork and exec, which touches no memory.
            unsafe { command.pre_exec(|| Ok(rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)?)) };
        }
        command
    }

    /// Starts the agent without waiting for it.
    pub fn launch(&mut self) {
        assert!(self.agent.is_none());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        self.agent = Some(self.command().stderr(log).spawn().unwrap());
    }

    /// Starts the agent and waits until it answers.
    pub async fn start(&mut self) {
        self.launch();
        let client = self.client();
        eventually("the agent answers", async || client.node_status().await.ok()).await;
    }

    /// Kills the agent as hard as can be.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Waits until the agent has ended by itself.
    pub fn wait_end(&mut self) -> std::process::ExitStatus {
        let mut agent = self.agent.take().unwrap();
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = agent.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent does not end");
            std::thread::yield_now();
        }
    }

    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.agent.as_ref().unwrap().id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // SAFETY: a valid signal number of the kernel's.
        let signal = unsafe { rustix::process::Signal::from_raw_unchecked(signal) };
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn log_path(&self) -> PathBuf {
        self.state().join("agent.log")
    }

    /// What the agent has said so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn client(&self) -> Client {
        Client::new(Endpoint::Unix(self.state().join("node.sock")), None).unwrap()
    }

    pub async fn put(&self, generation: u64, vms: &[VmSpec]) -> NodeStatus {
        self.client().put_desired(&Desired { generation, vms: vms.to_vec() }).await.unwrap()
    }

    /// Waits until the node's status satisfies `test`.
    pub async fn until(&self, what: &str, test: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
        let client = self.client();
        eventually(what, async || client.node_status().await.ok().filter(&test)).await
    }

    /// Waits until VM `id` satisfies `test`.
    pub async fn until_vm(&self, what: &str, id: VmId, test: impl Fn(&VmStatus) -> bool) -> VmStatus {
        let status = self.until(what, |s| s.vms.iter().any(|vm| vm.id == id && test(vm))).await;
        status.vms.into_iter().find(|vm| vm.id == id).unwrap()
    }

    pub async fn until_phase(&self, id: VmId, phase: VmPhase) -> VmStatus {
        self.until_vm(&format!("the VM is {phase:?}"), id, |vm| vm.phase == phase).await
    }

    /// The processes that run VMs of this node.
    pub fn processes(&self) -> Vec<(PathBuf, u32)> {
        let all = process::find_all().into_iter();
        all.filter(|(path, _)| path.starts_with(self.state())).map(|(path, p)| (path, p.pid)).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        for (_, pid) in self.processes() {
            kill(pid);
        }
        if std::thread::panicking() {
            eprintln!("--- the agent said:\n{}", self.log());
        }
    }
}

pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Asks again and again until there is an answer.
pub async fn eventually<T>(what: &str, mut ready: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = ready().await {
            return value;
        }
        assert!(Instant::now() < deadline, "within {} s: {what}", DEADLINE.as_secs());
        // Between two looks others may work; nothing is assumed to have happened by then.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
