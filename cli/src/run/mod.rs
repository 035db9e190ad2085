//! `bedplate run`: a VM from a disk image, its console here.

use std::io;
use std::path::PathBuf;

use bedplate_images::disk::DiskError;
use bedplate_images::trust::TrustError;
use bedplate_images::{Store, StoreError};

use crate::console::{self, End, Keys};
use crate::doctor::guest::Trial;
use crate::doctor::kvm;
use crate::net::{Net, NetError};
use crate::output::note;
use crate::place::{PlaceError, StoreArgs};
use crate::rundir::{RunDir, RunDirError};
use crate::size::parse_mib;
use crate::terminal;
use crate::vmm::{self, Vmm, VmmError, Walls};

mod boot;
mod lab;
mod source;

use source::Source;

/// Name of the console's socket in the run's directory.
const SERIAL: &str = "serial.sock";
const KEYS: Keys = Keys { leave: "stops the VM at once", power_button: true };

/// `bedplate run`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bedplate run debian-12.qcow2
  bedplate run debian-12.qcow2 --cpus 2 --memory 2G --net
  bedplate run web --persistent --name my-web
  bedplate run web --persistent --name db --shared /mnt/vms/db
  bedplate run rootfs.ext4 --kernel bzImage --cmdline 'quiet'
  bedplate run debian-12.raw --firmware /usr/share/seabios/bios-256k.bin   # by the disk's own boot loader
  bedplate run debian-12.qcow2 --lab      # where KVM cannot run guests

Keys: Ctrl-A X stops the VM at once, Ctrl-A P presses its power button, Ctrl-A A sends Ctrl-A, Ctrl-A ? helps.

Exits with 0 when the guest powered off or was reset, or when you left; with 1 when the VM could not be started or failed.")]
pub struct Args {
    /// A raw or qcow2 file, or the name or digest of an image in the local store; a file wins
    image: String,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    /// RAM, such as 512M or 2G
    #[arg(long, default_value = "512M", value_parser = parse_mib, value_name = "SIZE")]
    memory: u64,
    /// Kernel to boot (bzImage or ELF), instead of the one found in the image
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Start the disk's own boot loader with this BIOS, instead of a kernel found in the image; where none is found,
    /// Debian's SeaBIOS does that without being asked
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "cmdline"])]
    firmware: Option<PathBuf>,
    /// Words to add to the kernel's command line; the last word of a kind wins
    #[arg(long, value_name = "WORDS")]
    cmdline: Option<String>,
    /// Give the guest a network: an address by DHCP and, where nft is there, a way out (needs root)
    #[arg(long, conflicts_with = "lab")]
    net: bool,
    /// Keep what the guest writes, under the VM's name; without it, each run starts from the image
    #[arg(long)]
    persistent: bool,
    /// Keep it in this directory, which other machines mount too: only one of them at a time can run the VM. Each has the
    /// image in a store at the same path
    #[arg(long, value_name = "DIR", requires = "persistent", conflicts_with = "lab")]
    shared: Option<PathBuf>,
    /// Take a shared disk from a machine that is dead: watch the disk for 15 s first, and keep that machine from writing
    /// to it from then on
    #[arg(long, requires = "persistent", conflicts_with = "lab")]
    take_over: bool,
    /// Name of the VM: letters, digits and hyphens [default: from the image]
    #[arg(long, value_parser = source::parse_name)]
    name: Option<String>,
    /// Run it in an emulated machine (QEMU), where KVM here cannot run guests: slow, but complete
    #[arg(long)]
    lab: bool,
    /// The VMM image for --lab
    #[arg(long, value_name = "NAME", default_value = "vmm")]
    vmm_image: String,
    /// The VMM [default: beside this program, then in PATH]
    #[arg(long, value_name = "PATH", conflicts_with = "lab")]
    vmm: Option<PathBuf>,
    /// Let a guest that takes over its VMM do what you can do
    #[arg(long, conflicts_with = "lab")]
    no_sandbox: bool,
    #[command(flatten)]
    store: StoreArgs,
}

/// Why a VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm does not open.
    #[error(
        "/dev/kvm cannot be used ({0}), so no VM can run here; `bedplate doctor` says what to do, and --lab runs it in an emulated machine"
    )]
    NoKvm(io::Error),
    /// It opens, and is good for nothing.
    #[error("KVM here cannot run an unmodified kernel ({0}); add --lab to run it in an emulated machine")]
    BadKvm(String),
    /// No place for the store.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The image cannot be used.
    #[error(transparent)]
    Source(#[from] source::SourceError),
    /// Nothing to boot.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// The store, or what is in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody signed it whom this store trusts.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The disk cannot be made or used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// No place for the run's files.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// No network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The VM failed.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The emulated machine failed.
    #[error(transparent)]
    Lab(#[from] lab::LabError),
    /// The console broke.
    #[error("the VM's console broke: {0}")]
    Console(io::Error),
}

/// Runs it. Returns the exit code.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<u8, Error> {
    // What cannot work at all is said before anything takes time.
    let program = if args.lab { None } else { Some(usable_vmm(&args)?) };
    let store = Store::create(args.store.dir()?)?;
    let lease = store.lease()?;
    let source = Source::open(&store, &args.image)?;
    store.check_trust(&source.digest)?;
    let name = args.name.clone().unwrap_or_else(|| source.name());
    let run_dir = RunDir::create(store.dir(), &name)?;
    match program {
        Some(program) => {
            let disk = source.disk(&store, &run_dir, &name, &args)?;
            // From here on the disk keeps its image alive.
            drop(lease);
            on_kvm(&args, &program, &store, &source, &name, &run_dir, disk)
        }
        None => Ok(lab::run(&args, &store, &source, &name, &run_dir)?),
    }
}

/// The VMM, if KVM here can run guests with it.
fn usable_vmm(args: &Args) -> Result<PathBuf, Error> {
    kvm::open_kvm().map_err(Error::NoKvm)?;
    let program = vmm::locate(args.vmm.as_deref())?;
    match kvm::try_guest(&program, Walls::None)? {
        Trial::Works => Ok(program),
        Trial::Fails(words) => Err(Error::BadKvm(words)),
    }
}

fn on_kvm(
    args: &Args,
    program: &std::path::Path,
    store: &Store,
    source: &Source,
    name: &str,
    run_dir: &RunDir,
    disk: PathBuf,
) -> Result<u8, Error> {
    let start = boot::files(args, store, source, run_dir.path())?;
    let net = if args.net { Some(Net::start(name, run_dir.path())?) } else { None };
    if let Some(net) = &net {
        let reach = if net.way_out { "" } else { "; without nft it reaches this machine only" };
        note(&format!("The guest's address is {}{reach}.", net.guest));
    }
    let config = boot::config(args, start, disk, net.as_ref());
    let walls = if args.no_sandbox { Walls::None } else { Walls::Sandbox };
    let vmm = Vmm::start(program, run_dir.path(), name, &config, &format!("socket:{SERIAL}"), walls)?;
    let (vmm, serial) = vmm.connect(SERIAL)?;
    if terminal::is_interactive() {
        note(&format!("Console of {name}; Ctrl-A X stops it, Ctrl-A ? shows more."));
    }
    let end = on_terminal(serial, &vmm).map_err(Error::Console)?;
    let exit = if end == End::Closed { vmm.ended()? } else { vmm.stop() };
    if terminal::is_interactive() {
        note(&format!("{name} ended: {}", exit.detail));
    }
    Ok(exit_code(end))
}

fn on_terminal(serial: std::os::unix::net::UnixStream, vmm: &Vmm) -> io::Result<End> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        serial.set_nonblocking(true)?;
        let serial = tokio::net::UnixStream::from_std(serial)?;
        console::attach(serial, KEYS, || vmm.press_power_button()).await
    })
}

/// What a shell expects of a process that ended because of a signal.
fn exit_code(end: End) -> u8 {
    match end {
        End::Closed | End::Left => 0,
        End::Signal(number) => u8::try_from(128 + number).unwrap_or(1),
    }
}
