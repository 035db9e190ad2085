//! What a VM process knows: a configuration that is being put together, then a machine that runs. Which command may come
//! when stands here; what the commands do, in `configure` before the start, and in `change` after it.

use std::error::Error;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bedplate_api::vmm::{
    ActionType, CoreDump, Exit, ExitCounts, ExitReason, Inspection, InstanceInfo, LogLevel, RunState, Status,
    TargetState, Version, VmConfig,
};
use bedplate_devices::platform::{Booted, DebugLine};
use bedplate_images::disk::Disk;
use vmm_sys_util::eventfd::EventFd;

use super::commands::{Answer, Command};
use super::configure::warning_of_length;
use super::describe;
use super::fault::Fault;
use super::log::Log;
use super::metrics;
use super::signals::Signal;
use super::startup::{StartTimes, StartupTimes, cpu_time};
use crate::config::{self, Config, ConfigError, Held};
use crate::console::{Console, ConsoleError, Serving, Target};
use crate::debugger::{DebugSocket, Words};
use crate::files;
use crate::machine::builder::Outlets;
use crate::machine::unknown_msrs::Warn;
use crate::machine::{BuildError, Machine, PauseError, builder};
use crate::metadata::Metadata;
use crate::residence;
use crate::sandbox::{self, Access, Sandbox};

const NAME: &str = "Bedplate";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";

/// After the start of a VM: by then the code that starts it is not used any more, and its memory can go back.
const SETTLED: Duration = Duration::from_secs(1);

/// From the power button, when it was SIGTERM, to the end of a guest that does not listen. Whoever sends that wants an end.
const GRACE: Duration = Duration::from_secs(60);

/// Between two lines of metrics: Firecracker's.
const FLUSH_PERIOD: Duration = Duration::from_secs(60);

/// How long a vCPU may take to show its registers, which leaves the guest at once, but may have to wait for a processor; and
/// how long all may take to let go of devices.
const INSPECT_PATIENCE: Duration = Duration::from_secs(1);

/// Why the VM did not start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error("{what} {path}: {source}; {}", files::remedy(.source))]
    File { what: &'static str, path: String, source: io::Error },
    #[error("metadata file {}: {source}; {}", path.display(), remedy_for_metadata(.source))]
    Metadata { path: PathBuf, source: io::Error },
    #[error("the host cannot give what the process needs: {0}")]
    Host(#[from] io::Error),
}

/// What the command line says of the process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Name of the VM.
    pub id: String,
    /// The guest finds a boot timer.
    pub boot_timer: bool,
    /// When the process began.
    pub start: StartTimes,
    /// Bytes of metadata, at most.
    pub mmds_size_limit: usize,
    /// Taps that network interfaces can have while the VM runs, beside those of its own.
    pub taps: Vec<String>,
}

/// The process's state, owned by the control thread.
pub struct Session {
    settings: Settings,
    /// By the numbers of the host, also where this process has a pid namespace of its own.
    pid: u32,
    startup: StartupTimes,
    pub(super) spec: VmConfig,
    /// Until the start.
    pub(super) console: Option<Console>,
    pub(super) vm: Option<Running>,
    pub(super) log: Log,
    pub(super) metrics: Option<File>,
    /// When what only the start needed of the program is let go of.
    shed: Option<Instant>,
    /// When the guest is ended that SIGTERM has asked to.
    last_call: Option<Instant>,
    /// When counters were written last, or the VM was started.
    flushed: Instant,
    pub(super) metadata: Metadata,
    /// What the process goes into at the start, with what must stay visible whatever the VM is; none if a person wants
    /// none.
    pub(super) sandbox: Option<Sandbox>,
    /// The files that the devices of the VM have.
    pub(super) held: Held,
    debugger: Option<DebugSocket>,
    leave: EventFd,
    ended: EventFd,
    departed: EventFd,
    /// Set where the process shall end without a VM.
    early_exit: Option<Exit>,
}

/// Dropped in this order: the console delivers the last output of a machine that runs no more.
pub(super) struct Running {
    pub(super) machine: Machine,
    paused: bool,
    _console: Serving,
    /// The virtio one.
    _second: Option<Serving>,
}

impl Session {
    /// A process without a VM. `console` is where the guest's serial port will go, `sandbox` what the process goes into
    /// with the VM.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(settings: Settings, console: Console, sandbox: Option<Sandbox>) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            log: Log::new(&settings.id),
            metadata: Metadata::new(settings.mmds_size_limit)?,
            settings,
            pid: pid(),
            startup: StartupTimes::default(),
            spec: VmConfig::default(),
            console: Some(console),
            vm: None,
            metrics: None,
            flushed: Instant::now(),
            sandbox,
            debugger: None,
            shed: None,
            last_call: None,
            leave: event()?,
            ended: event()?,
            departed: event()?,
            held: Held::default(),
            early_exit: None,
        })
    }

    /// Says what is not as whoever started this may think.
    pub fn warn(&self, warnings: impl IntoIterator<Item = String>) {
        warnings.into_iter().for_each(|warning| self.log.write(LogLevel::Warning, &warning));
    }

    /// The guest, when it is started, waits for a debugger.
    pub fn set_debugger(&mut self, socket: DebugSocket) {
        self.debugger = Some(socket);
    }

    /// Takes over all of `spec` and starts it.
    ///
    /// # Errors
    /// It cannot be built here; the message is for a person.
    pub fn start_with(&mut self, mut spec: VmConfig) -> Result<(), StartError> {
        if let Some(logger) = &spec.logger {
            self.set_logger(logger)?;
        }
        if let Some(metrics) = &spec.metrics {
            self.set_metrics(metrics)?;
        }
        if let Some(serial) = &spec.serial {
            self.set_serial(serial)?;
        }
        if let Some(mmds) = &spec.mmds_config {
            self.set_mmds(mmds);
        }
        // The command line may have said where counters go.
        spec.metrics = spec.metrics.or(self.spec.metrics.take());
        if spec.cpu_config.is_some() {
            spec.machine_config.cpu_template = None;
        }
        self.spec = spec;
        self.start()
    }

    fn start(&mut self) -> Result<(), StartError> {
        let booted = self.settings.boot_timer.then(|| boot_timer(self.log.clone()));
        let config = config::validate(&self.spec)?;
        self.held = config::separate(&config.drives, &config.pmems, &Held::default())?;
        let second = config.console.as_ref().map(|console| Console::open(&console.target, None));
        let second = second.transpose()?;
        let console = match self.console.take() {
            Some(console) => console,
            None => Console::open(&Target::Off, None)?,
        };
        // Inside of the sandbox the files may not be seen any more.
        let lengths: Vec<_> = config.files().filter_map(warning_of_length).collect();
        let outlets = Outlets {
            serial: Box::new(console.sink()),
            console: second.as_ref().map(Console::sink),
            ended: &self.ended,
            departed: &self.departed,
            taps: &self.settings.taps,
            booted,
            firmware_words: self.log.wants(LogLevel::Debug).then(|| firmware_words(self.log.clone())),
            warn: warn(self.log.clone()),
            debugger: self.debugger.as_ref().map(|socket| (socket, debugger_words(self.log.clone()))),
            metadata: self.metadata.clone(),
            sandbox: self.sandbox.clone().map(|sandbox| around(sandbox, &config)),
        };
        let mut machine = match builder::start(&config, outlets) {
            Ok(machine) => machine,
            Err(error) => {
                // To be tried again after a correction; but a process that is inside of its sandbox, or half, is of no use.
                self.console = Some(console);
                if sandbox::is_inside() || matches!(error, BuildError::Sandbox(_)) {
                    self.give_up(&error);
                }
                return Err(error.into());
            }
        };
        for warning in lengths.into_iter().chain(machine.devices_mut().take_warnings()) {
            self.log.write(LogLevel::Warning, &warning);
        }
        let second = second.zip(machine.devices().console().cloned());
        let serve = || -> io::Result<_> {
            let console = console.serve(machine.serial().try_clone()?, &self.leave)?;
            Ok((console, second.map(|(console, line)| console.serve(line, &self.leave)).transpose()?))
        };
        // The guest has run: there is no second try.
        let (_console, _second) = serve().inspect_err(|error| self.give_up(error))?;
        self.flushed = Instant::now();
        sandbox::narrow(sandbox::Thread::Control);
        self.shed = Some(Instant::now() + SETTLED);
        self.vm = Some(Running { machine, paused: false, _console, _second });
        match &self.debugger {
            None => self.log.write(LogLevel::Info, "the VM runs"),
            Some(socket) => {
                let path = socket.path().display();
                let message =
                    format!("the guest waits for a debugger, which can do anything to it: target remote {path}");
                self.log.write(LogLevel::Warning, &message);
            }
        }
        Ok(())
    }

    /// The process ends without a VM.
    fn give_up(&mut self, error: &dyn Error) {
        self.early_exit = Some(Exit { reason: ExitReason::HostFault, detail: error.to_string() });
    }

    /// The process can be used from now on.
    pub(super) fn note_startup(&mut self) {
        self.startup = self.settings.start.until_now();
        let StartupTimes { elapsed_us, cpu_us } = self.startup;
        for (what, time) in [("process startup time", elapsed_us), ("process startup processor time", cpu_us)] {
            if let Some(time) = time {
                self.log.write(LogLevel::Info, &format!("{what}: {time} us"));
            }
        }
    }

    pub(super) const fn leave(&self) -> &EventFd {
        &self.leave
    }

    pub(super) const fn ended(&self) -> &EventFd {
        &self.ended
    }

    pub(super) const fn departed(&self) -> &EventFd {
        &self.departed
    }

    /// How it all ended, once: then there is no machine any more.
    pub(super) fn take_exit(&mut self) -> Option<Exit> {
        if let Some(exit) = self.early_exit.take() {
            return Some(exit);
        }
        let exit = self.vm.as_ref()?.machine.exit()?.clone();
        if let Err(error) = self.flush_metrics() {
            self.log.write(LogLevel::Warning, &error.message);
        }
        let refused = self.vm.as_ref().map_or(0, |vm| vm.machine.exits().unknown_msr);
        if refused > 0 {
            let message = format!("the guest touched model-specific registers that it does not have {refused} times");
            self.log.write(LogLevel::Info, &message);
        }
        self.vm = None;
        self.log.write(LogLevel::Info, &format!("the VM has ended: {}", exit.detail));
        Some(exit)
    }

    pub(super) fn signal(&mut self, signal: Signal) {
        match (signal, &self.vm) {
            (Signal::PowerButton, Some(_)) if self.last_call.is_some() => self.stop("a second SIGTERM"),
            (Signal::PowerButton, Some(vm)) => {
                vm.machine.press_power_button();
                self.last_call = Some(Instant::now() + GRACE);
                self.log.write(LogLevel::Info, "SIGTERM: pressed the power button");
            }
            (Signal::PowerButton, None) => self.stop("SIGTERM before the start"),
            (Signal::Stop, _) => self.stop("stopped by a signal"),
        }
    }

    pub(super) fn stop(&mut self, detail: &str) {
        match &self.vm {
            Some(vm) => vm.machine.stop(detail),
            None => self.early_exit = Some(Exit { reason: ExitReason::Stopped, detail: detail.into() }),
        }
    }

    /// Does what was asked.
    pub(super) fn execute(&mut self, command: Command) -> Result<Answer, Fault> {
        // What has gone is known of before anything is answered.
        self.settle();
        if let Some(words) = command.deprecation() {
            self.log.write(LogLevel::Warning, words);
        }
        match command {
            Command::DescribeInstance => Ok(Answer::Instance(InstanceInfo {
                app_name: NAME.into(),
                id: self.settings.id.clone(),
                state: self.state(),
                vmm_version: VERSION.into(),
            })),
            Command::DescribeVersion => Ok(Answer::Version(Version { firecracker_version: VERSION.into() })),
            Command::DescribeConfig => Ok(Answer::Config(describe::vm(&self.spec))),
            Command::DescribeMachine => Ok(Answer::Machine(describe::machine(&self.spec.machine_config))),
            Command::DescribeStatus => Ok(Answer::Status(self.status())),
            Command::Inspect => {
                let state = self.state();
                Ok(Answer::Inspection(Box::new(self.running()?.inspect(state))))
            }
            Command::DescribeMetadata => Ok(Answer::Metadata(self.described_metadata())),
            Command::PutMetadata(data) => self.put_metadata(data).map(done),
            Command::PatchMetadata(patch) => self.patch_metadata(patch).map(done),
            Command::Stop => {
                self.stop("stopped through the API");
                Ok(Answer::Done)
            }
            Command::Act(ActionType::InstanceStart) => {
                self.before_start()?.start().map_err(Fault::bad_request).map(done)
            }
            Command::Act(ActionType::FlushMetrics) => {
                self.running()?;
                self.flush_metrics().map(done)
            }
            Command::Act(ActionType::SendCtrlAltDel) | Command::PressPowerButton => {
                self.running()?.machine.press_power_button();
                Ok(Answer::Done)
            }
            Command::Console(command) => self.execute_console(command).map(done),
            Command::DumpCore(dump) => self.dump_core(&dump).map(done),
            Command::Balloon(command) => self.execute_balloon(command),
            Command::Hotplug(command) => self.execute_hotplug(command),
            Command::Pmem(command) => self.execute_pmem(command),
            Command::PutFileSystem(file_system) => self.put_file_system(file_system).map(done),
            Command::DescribeVcpus => self.vcpus().map(Answer::Vcpus).ok_or_else(|| Fault::bad_request(BEFORE_START)),
            Command::PlugVcpus(update) => self.plug_vcpus(&update).map(done),
            Command::ChangeState(target) => self.running()?.change_state(target).map(done),
            Command::PatchDrive(patch) => self.after_start()?.patch_drive(&patch).map(done),
            Command::PatchNetworkInterface(patch) => self.after_start()?.patch_network_interface(&patch).map(done),
            Command::PutDrive(drive) if self.vm.is_some() => self.plug_drive(drive).map(done),
            Command::PutNetworkInterface(interface) if self.vm.is_some() => self.plug_net(interface).map(done),
            Command::Unplug(device) => self.after_start()?.unplug(&device).map(done),
            Command::CreateSnapshot(_) => self.after_start()?.no_snapshots("Create").map(done),
            Command::LoadSnapshot(_) => self.before_start()?.no_snapshots("Load").map(done),
            configuring => self.before_start()?.configure(configuring).map(done),
        }
    }

    /// The VM stands still meanwhile, and so does the API.
    fn dump_core(&mut self, dump: &CoreDump) -> Result<(), Fault> {
        let vm = self.running()?;
        let stood = vm.paused;
        let dumped = vm.machine.dump_core(Path::new(&dump.path), INSPECT_PATIENCE);
        if !stood {
            vm.machine.resume();
        }
        dumped.map_err(|error| self.fault_of_file(&error))
    }

    pub(super) fn before_start(&mut self) -> Result<&mut Self, Fault> {
        if self.vm.is_some() { Err(Fault::bad_request(AFTER_START)) } else { Ok(self) }
    }

    fn after_start(&mut self) -> Result<&mut Self, Fault> {
        if self.vm.is_some() { Ok(self) } else { Err(Fault::bad_request(BEFORE_START)) }
    }

    pub(super) fn running(&mut self) -> Result<&mut Running, Fault> {
        self.vm.as_mut().ok_or_else(|| Fault::bad_request(BEFORE_START))
    }

    /// How long there is nothing to do unless something happens.
    pub(super) fn until_due(&self) -> Option<Duration> {
        let times = self.shed.into_iter().chain(self.last_call);
        let times = times.map(|at| at.saturating_duration_since(Instant::now()));
        times.chain(self.until_flush()).min()
    }

    /// Does what it is time for.
    pub(super) fn work_in_time(&mut self) {
        self.flush_in_time();
        if self.shed.take_if(|at| *at <= Instant::now()).is_some() {
            residence::shed_program();
        }
        if self.last_call.take_if(|at| *at <= Instant::now()).is_some() {
            self.stop(&format!("the guest did not power off within {} s of SIGTERM", GRACE.as_secs()));
        }
    }

    /// When counters are to be written again; never, if nobody wants them.
    fn until_flush(&self) -> Option<Duration> {
        let wanted = self.metrics.is_some() && self.vm.is_some();
        wanted.then(|| FLUSH_PERIOD.saturating_sub(self.flushed.elapsed()))
    }

    /// Writes counters if it is time to.
    fn flush_in_time(&mut self) {
        if self.until_flush() == Some(Duration::ZERO)
            && let Err(error) = self.flush_metrics()
        {
            self.log.write(LogLevel::Warning, &error.message);
        }
    }

    fn flush_metrics(&mut self) -> Result<(), Fault> {
        let status = self.status();
        self.flushed = Instant::now();
        let (Some(spec), Some(file)) = (&self.spec.metrics, &mut self.metrics) else { return Ok(()) };
        let mut line = serde_json::to_vec(&metrics::line(spec, status)).map_err(Fault::bad_request)?;
        line.push(b'\n');
        file.write_all(&line).map_err(|error| Fault::bad_request(format!("metrics cannot be written: {error}")))
    }

    fn state(&self) -> RunState {
        match &self.vm {
            None => RunState::NotStarted,
            Some(vm) if vm.paused => RunState::Paused,
            Some(_) => RunState::Running,
        }
    }

    fn status(&self) -> Status {
        Status {
            id: self.settings.id.clone(),
            state: self.state(),
            pid: self.pid,
            process_startup_time_us: self.startup.elapsed_us,
            process_startup_time_cpu_us: self.startup.cpu_us,
            uptime_seconds: self.vm.as_ref().map_or(0, |vm| vm.machine.uptime().as_secs()),
            exits: self.vm.as_ref().map_or(ExitCounts::default(), |vm| vm.machine.exits()),
            vcpus: self.vcpus(),
            devices: self.vm.as_ref().map(|vm| vm.machine.status()).unwrap_or_default(),
        }
    }
}

impl Running {
    fn inspect(&self, state: RunState) -> Inspection {
        let vcpus = self.machine.inspect(INSPECT_PATIENCE);
        let queues = self.machine.devices().queues(INSPECT_PATIENCE);
        Inspection { state, vcpus, queues }
    }

    fn change_state(&mut self, target: TargetState) -> Result<(), Fault> {
        self.paused = match target {
            TargetState::Paused => match self.machine.pause() {
                Ok(()) => true,
                Err(PauseError::Ended) => false,
                Err(error) => return Err(Fault::bad_request(format!("Failed to pause the VM: {error}."))),
            },
            TargetState::Resumed => {
                self.machine.resume();
                false
            }
        };
        Ok(())
    }
}

/// What the host calls this process: its `/proc` is of its numbers, and can be seen before the sandbox.
fn pid() -> u32 {
    let own = std::fs::read_link("/proc/self").ok();
    own.and_then(|own| own.to_str()?.parse().ok()).unwrap_or_else(std::process::id)
}

/// What to do about a metadata file.
fn remedy_for_metadata(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::PermissionDenied => "check the path and who may read it",
        _ => "correct it, or raise --mmds-size-limit if it is too long",
    }
}

/// What this VM uses by name while it runs.
fn around(mut sandbox: Sandbox, config: &Config) -> Sandbox {
    for drive in config.files() {
        let dir = Path::new(&drive.path);
        // A copy-on-write disk reads its image's chunks as the guest asks for them; a raw file is open already. One that
        // cannot be read is the builder's to complain about.
        if let Ok(spec) = Disk::spec_of(dir) {
            sandbox.keep(dir, Access::Write);
            sandbox.keep(&spec.store, Access::Read);
            // Connected to when a chunk is not there, and again when who serves it was started again.
            if let Some(source) = &drive.chunk_source {
                sandbox.keep_place_of(Path::new(&source.socket), Access::Write);
            }
        }
    }
    if let Some(config::ConsoleConfig { target: Target::Socket(path), .. }) = &config.console {
        sandbox.keep_place_of(path, Access::Write);
    }
    if let Some(vsock) = &config.vsock {
        sandbox.keep_place_of(&vsock.path, Access::Write);
    }
    sandbox
}

fn done((): ()) -> Answer {
    Answer::Done
}

/// Writes what a person may want to know of the guest: ordinary ones try registers, too, and go on without them.
fn warn(log: Log) -> Warn {
    Box::new(move |text| log.write(LogLevel::Info, text))
}

/// Writes what debuggers do.
fn debugger_words(log: Log) -> Words {
    Box::new(move |words| log.write(LogLevel::Info, words))
}

/// Writes what firmware says.
fn firmware_words(log: Log) -> DebugLine {
    Box::new(move |line| log.write(LogLevel::Debug, &format!("firmware: {line}")))
}

/// Says how long the guest took to boot, in wall time and in processor time of this process.
fn boot_timer(log: Log) -> Booted {
    let (started, cpu_started) = (Instant::now(), cpu_time());
    Box::new(move || {
        let (us, cpu_us) = (started.elapsed().as_micros(), (cpu_time() - cpu_started).as_micros());
        let (ms, cpu_ms) = (us / 1000, cpu_us / 1000);
        // As Firecracker says it: tools look for it.
        let message = format!("Guest-boot-time = {us:>6} us {ms} ms, {cpu_us:>6} CPU us {cpu_ms} CPU ms");
        log.write(LogLevel::Info, &message);
    })
}
