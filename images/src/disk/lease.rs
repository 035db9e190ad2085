//! Who may write a disk that several nodes can reach: a lease with a fencing epoch.
//!
//! ```text
//! lease.{epoch}.{count}   the lease, an empty file whose name is all it says; `lease.{epoch}.free` when nobody has it
//! holder.{epoch}          who took it, since when, and for how long it lives without a renewal
//! data.{n}, map.{n}       the disk's files, made in epoch n; `data` and `map` are those of epoch 0
//! ```
//!
//! There is one lease file, and everything is done by renaming it: the holder raises the count (renews), gives the lease
//! back, or somebody else raises the epoch (claims). Of several who rename one name, one succeeds, on every file system
//! that several nodes can mount; the others learn that the name is gone. That is all the agreement there is: no clock of
//! one node is compared with another's, and no lock has to pass from node to node.
//!
//! 1. Who finds the lease held watches the name for the holder's period by his own clock, and claims it from the last name
//!    that he saw, so that a renewal in the last moment wins.
//! 2. A holder that only slept cannot be kept from writing to files that it has open. Who claims from it therefore makes
//!    new files (`fork.rs`), and a name of the old ones means nothing any more.
//! 3. A flush is acknowledged after the lease was renewed, after everything was synced. So what was acknowledged was there
//!    before the claim, and is in the copy; what comes later fails.
//! 4. A lease that was given back, or whose holder was a process of this host and is dead, needs no copy: nobody has the
//!    files open.
//! 5. `map.{n}` gets its name when both files are whole. Who died before that leaves pieces that the next one removes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use super::fork;
use super::record::{Record, SCHEMA, Token, who};
use crate::store::{Locked, StoreError, sync_dir};

/// Renewals per period: two may come too late or fail before anybody may take the disk.
const RENEWALS: u32 = 3;

/// Looks per period at a lease that is watched.
const LOOKS: u32 = 10;

/// Who opens a shared disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    name: String,
    period: Duration,
}

impl Holder {
    /// The period that is long enough for a shared file system that stalls, and short enough to wait for.
    pub const PERIOD: Duration = Duration::from_secs(15);

    /// This host until it boots again: its name, and the boot's id, which no other host and no other boot has.
    pub fn this_host() -> Result<Self, LeaseError> {
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(path).map_err(io_at("read", path))?;
        let system = rustix::system::uname();
        let host = system.nodename().to_string_lossy();
        let host: String = host.chars().filter(char::is_ascii_graphic).take(26).collect();
        Self::named(&format!("{host}/{}", boot.trim()))
    }

    /// A holder of another name, 1 to 64 visible ASCII characters. Two processes that may run at the same time and do not
    /// see each other's `flock` must not have the same.
    pub fn named(name: &str) -> Result<Self, LeaseError> {
        if !is_name(name) {
            return Err(LeaseError::BadName);
        }
        Ok(Self { name: name.to_owned(), period: Self::PERIOD })
    }

    /// Another period: a lease that was not renewed for so long may be taken over. From 100 ms to an hour.
    pub fn with_period(self, period: Duration) -> Result<Self, LeaseError> {
        if !is_period(period) {
            return Err(LeaseError::BadPeriod);
        }
        Ok(Self { period, ..self })
    }
}

pub(super) fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_graphic())
}

pub(super) fn is_period(period: Duration) -> bool {
    (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&period)
}

/// Why a lease cannot be had, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody else has it.
    #[error(
        "the disk {dir} is held by {holder} since {since}: stop the VM there first; if that node is dead, take the disk \
         over, which watches it for {period:?} and then does"
    )]
    Held {
        /// The directory.
        dir: PathBuf,
        /// Who.
        holder: String,
        /// By the holder's clock, in UTC.
        since: String,
        /// How long a lease lives that is not renewed.
        period: Duration,
    },
    /// A process of this host has it.
    #[error("the disk {dir} is open in another process of this host: stop the VM that uses it first")]
    OpenHere {
        /// The directory.
        dir: PathBuf,
    },
    /// It was renewed, or somebody else took it, while it was watched.
    #[error("the disk {dir} is not to be taken over: {holder} gave a sign of life, so stop the VM there first")]
    Alive {
        /// The directory.
        dir: PathBuf,
        /// Who.
        holder: String,
    },
    /// It was ours.
    #[error(
        "the disk {dir} was taken over by {by}, and nothing that is written here any more is kept: stop this VM, and look \
         why it could not renew its lease"
    )]
    Lost {
        /// The directory.
        dir: PathBuf,
        /// Who has it now, where that is known.
        by: String,
    },
    /// It is ours, but could not be renewed for a whole period.
    #[error("the lease on the disk {dir} cannot be renewed: check the shared file system; writes fail until it can")]
    Late {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory does not have what the lease's rules put there.
    #[error(
        "{path} is damaged or of a later version ({cause}): see \"A disk on a shared directory\" in docs/image-format.md"
    )]
    Bad {
        /// The file, or the directory.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// A holder's name.
    #[error("the name of a disk's holder has 1 to 64 visible ASCII characters")]
    BadName,
    /// A holder's period.
    #[error("a lease's period is from 100 ms to an hour")]
    BadPeriod,
    /// A directory that cannot be synced.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system said no.
    #[error("cannot {what} {path}: {cause}")]
    Io {
        /// A verb.
        what: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
}

pub(super) fn io_at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LeaseError {
    move |cause| LeaseError::Io { what, path: path.to_owned(), cause }
}

pub(super) fn bad(path: &Path, cause: impl Into<String>) -> LeaseError {
    LeaseError::Bad { path: path.to_owned(), cause: cause.into() }
}

/// What to do about a lease that a living or dead holder has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IfHeld {
    /// Say who has it.
    Refuse,
    /// Watch it for the holder's period, and take it if nothing moves.
    TakeOver,
}

/// A lease that was claimed. Unless it is [`Lease::ready`], the files of this epoch are still to be made.
#[derive(Debug)]
pub(super) struct Lease {
    shared: Arc<Shared>,
    timer: Option<Timer>,
    /// The epoch whose files have the disk's content.
    files: u64,
    forks: bool,
    /// Locked while this process lives; see [`Record`].
    _record: Option<Locked>,
}

impl Lease {
    /// The lease of a directory that is just being made a disk.
    pub(super) fn create(dir: &Path) -> io::Result<()> {
        // Whoever makes this file makes the disk.
        File::create_new(Token { epoch: 0, count: Some(0) }.path(dir)).map(drop)
    }

    /// The directory is a disk, and nobody has it open.
    pub(super) fn created(dir: &Path) -> Result<(), LeaseError> {
        let (from, to) = (Token { epoch: 0, count: Some(0) }, Token { epoch: 0, count: None });
        fs::rename(from.path(dir), to.path(dir)).map_err(io_at("write", &to.path(dir)))?;
        Ok(sync_dir(dir)?)
    }

    /// Takes the lease on the disk in `dir`.
    pub(super) fn take(dir: &Path, holder: &Holder, if_held: IfHeld) -> Result<Self, LeaseError> {
        let mut seen = Token::look(dir)?;
        let mut forks = false;
        let mut dead = None;
        if seen.count.is_some() {
            let record = Record::read(dir, seen.epoch)?;
            match record.as_ref().filter(|record| record.locked && record.holder == holder.name) {
                Some(ours) => {
                    dead = Record::lock_of_dead(dir, seen.epoch);
                    if dead.is_none() {
                        return Err(LeaseError::OpenHere { dir: dir.to_owned() });
                    }
                    forks = ours.forks && fork::published(dir, seen.epoch)? != seen.epoch;
                }
                None => {
                    let period = record.as_ref().map_or(holder.period, Record::period);
                    if if_held == IfHeld::Refuse {
                        let (holder, since) = who(record.as_ref());
                        return Err(LeaseError::Held { dir: dir.to_owned(), holder, since, period });
                    }
                    seen = watch(dir, seen, period)?;
                    forks = seen.count.is_some();
                }
            }
        }
        let epoch = seen.epoch.checked_add(1).ok_or_else(|| bad(&seen.path(dir), "no epoch can follow"))?;
        let renewed = Instant::now();
        match fs::rename(seen.path(dir), Token { epoch, count: Some(0) }.path(dir)) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(alive(dir)),
            Err(e) => return Err(io_at("rename", &seen.path(dir))(e)),
        }
        sync_dir(dir)?;
        drop(dead);
        step()?;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        // At most an hour.
        let (name, period_ms) = (holder.name.clone(), holder.period.as_millis() as u64);
        let mut record = Record { schema: SCHEMA, holder: name, since, period_ms, locked: false, forks };
        let lock = record.publish(dir, epoch).inspect_err(|_| {
            // Such as on a full disk: nobody shall have to wait for a holder that never was. Where old files are still to
            // be copied, whoever comes next must know.
            if !forks {
                let [from, to] = [Some(0), None].map(|count| Token { epoch, count }.path(dir));
                let _ = fs::rename(from, to);
            }
        })?;
        step()?;
        let files = fork::published(dir, epoch)?;
        let state = AtomicU8::new(State::Current as u8);
        let turn = Mutex::new(Turn { count: 0, renewed });
        let shared = Arc::new(Shared { dir: dir.to_owned(), epoch, period: holder.period, state, turn });
        Ok(Self { shared, timer: None, files, forks, _record: lock })
    }

    /// From now on the lease is renewed by a thread of its own, which ends with this. It needs no more than `rename`, `stat`
    /// and its time.
    pub(super) fn start_timer(&mut self) -> Result<(), LeaseError> {
        self.timer = Some(Timer::start(&self.shared)?);
        Ok(())
    }

    /// No longer.
    pub(super) fn stop_timer(&mut self) {
        self.timer = None;
    }

    /// Where new files have to be made before the disk is opened: of what epoch the old and the new ones are.
    pub(super) fn fork(&self) -> Option<(u64, u64)> {
        if self.forks { Some((self.files, self.shared.epoch)) } else { None }
    }

    /// The files of this epoch have been made, where that was necessary. What nobody needs any more goes.
    pub(super) fn ready(&mut self) -> Result<(), LeaseError> {
        // Who lost the lease meanwhile must not remove anything.
        self.renew()?;
        if self.forks {
            self.files = self.shared.epoch;
            self.forks = false;
        }
        step()?;
        fork::clear(&self.shared.dir, self.files, self.shared.epoch)
    }

    /// The epoch whose files are the disk's.
    pub(super) const fn files(&self) -> u64 {
        self.files
    }

    /// Whether a write may begin. Costs one load while all is well.
    pub(super) fn writable(&self) -> Result<(), LeaseError> {
        self.shared.check(State::Late)
    }

    /// Whether the lease was ours when it was last seen. Costs one load while it was.
    pub(super) fn current(&self) -> Result<(), LeaseError> {
        self.shared.check(State::Lost)
    }

    /// Raises the count. That works exactly while nobody else has claimed the lease.
    pub(super) fn renew(&self) -> Result<(), LeaseError> {
        self.shared.renew()
    }

    /// How often.
    pub(super) fn renewal(&self) -> Duration {
        self.shared.period / RENEWALS
    }
}

impl Drop for Lease {
    /// Gives the lease back. Where new files should have been made and were not, whoever comes next has to, as after a
    /// holder that died.
    fn drop(&mut self) {
        self.timer = None;
        if !self.forks {
            let turn = self.shared.turn();
            let [from, to] = [Some(turn.count), None].map(|count| Token { epoch: self.shared.epoch, count });
            // If it was lost, this name is gone; after any other failure the lease ends by itself.
            let given = fs::rename(from.path(&self.shared.dir), to.path(&self.shared.dir));
            let _ = given.is_ok_and(|()| sync_dir(&self.shared.dir).is_ok());
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Current = 0,
    /// Not renewed for a whole period: somebody may have claimed it.
    Late = 1,
    /// Somebody has.
    Lost = 2,
}

/// What the disk's thread and the timer share.
#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    epoch: u64,
    period: Duration,
    /// A [`State`]; changed with `turn` locked, read by anybody.
    state: AtomicU8,
    turn: Mutex<Turn>,
}

#[derive(Debug)]
struct Turn {
    count: u64,
    /// When the last renewal that worked was asked for.
    renewed: Instant,
}

impl Shared {
    fn turn(&self) -> std::sync::MutexGuard<'_, Turn> {
        // Both fields are set after everything that could fail.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, worst: State) -> Result<(), LeaseError> {
        let state = self.state.load(Ordering::Relaxed);
        if state < worst as u8 {
            return Ok(());
        }
        Err(if state == State::Lost as u8 { self.lost() } else { LeaseError::Late { dir: self.dir.clone() } })
    }

    #[cold]
    fn lost(&self) -> LeaseError {
        // By name and without reading the directory: this runs where few system calls are allowed.
        let next = self.epoch.checked_add(1).and_then(|epoch| Record::read(&self.dir, epoch).ok().flatten());
        let by = next.map_or_else(|| "another node".to_owned(), |record| record.holder);
        LeaseError::Lost { dir: self.dir.clone(), by }
    }

    fn renew(&self) -> Result<(), LeaseError> {
        let mut turn = self.turn();
        self.check(State::Lost)?;
        let asked = Instant::now();
        let token = |count| Token { epoch: self.epoch, count: Some(count) }.path(&self.dir);
        let (from, to) = (token(turn.count), token(turn.count.wrapping_add(1)));
        match fs::rename(&from, &to) {
            Ok(()) => {}
            // A network file system may carry a request out twice, and answer the second time.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if !fs::exists(&to).map_err(io_at("examine", &to))? {
                    self.state.store(State::Lost as u8, Ordering::Relaxed);
                    return Err(self.lost());
                }
            }
            Err(e) => return Err(io_at("rename", &from)(e)),
        }
        *turn = Turn { count: turn.count.wrapping_add(1), renewed: asked };
        self.state.store(State::Current as u8, Ordering::Relaxed);
        Ok(())
    }

    /// Renews in time. Returns whether there is a next time.
    fn tick(&self) -> bool {
        match self.renew() {
            Ok(()) => true,
            Err(LeaseError::Lost { .. }) => false,
            Err(_) => {
                let turn = self.turn();
                if turn.renewed.elapsed() > self.period && self.check(State::Late).is_ok() {
                    self.state.store(State::Late as u8, Ordering::Relaxed);
                }
                true
            }
        }
    }
}

/// The thread that renews. Dropped, it has ended; a renewal that hangs on the file system is waited for.
#[derive(Debug)]
struct Timer {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Timer {
    fn start(shared: &Arc<Shared>) -> Result<Self, LeaseError> {
        let (stop, stopped) = mpsc::channel();
        let (ours, dir) = (Arc::clone(shared), shared.dir.clone());
        let run = move || {
            let pause = ours.period / RENEWALS;
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) && ours.tick() {}
        };
        let thread = thread::Builder::new().name("lease".to_owned()).spawn(run).map_err(io_at("keep", &dir))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.stop = None;
        // A panic of the thread has been reported where it happened.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Watches a held lease for `period`. Returns the name to claim it from: the one that was `seen`, or a free one.
fn watch(dir: &Path, seen: Token, period: Duration) -> Result<Token, LeaseError> {
    let since = Instant::now();
    while since.elapsed() < period {
        thread::sleep(period / LOOKS);
        let now = Token::look(dir)?;
        if now != seen {
            return if now.count.is_none() { Ok(now) } else { Err(alive(dir)) };
        }
    }
    Ok(seen)
}

fn alive(dir: &Path) -> LeaseError {
    let record = Token::look(dir).and_then(|token| Record::read(dir, token.epoch));
    LeaseError::Alive { dir: dir.to_owned(), holder: who(record.ok().flatten().as_ref()).0 }
}

/// A point at which a test lets whoever takes a lease die.
#[cfg(not(test))]
pub(super) const fn step() -> Result<(), LeaseError> {
    Ok(())
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;

#[cfg(test)]
pub(super) use tests::step;
