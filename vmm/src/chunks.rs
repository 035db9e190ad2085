//! Asking for what a disk's image lacks on this host: the VM's end of [`bedplate_api::vmm::chunks`].
//!
//! Belongs to the worker of one disk and never waits: the worker watches one descriptor, behind which there are the stream
//! and a timer. Who is at the other end may be killed and started again; what is wanted then is asked for again, and what
//! does not come in time is given up. The other end is trusted with nothing but the chunks' coming: each is verified when
//! it is read.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bedplate_api::vmm::ChunkSource;
use bedplate_api::vmm::chunks::{Arrival, MAX_WANTED, NOTED_SECONDS, Note};
use rustix::event::epoll;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// How often is looked whether the other end is back and whether something has waited too long.
const TICK: Duration = Duration::from_millis(250);
/// How long an answer holds: every request that waited for the chunk shall hear of it, and a later one shall not.
const LINGER: Duration = Duration::from_secs(1);
/// Chunks that are told to have been read, at most: 1 GiB, more than a boot reads.
const MAX_NOTED: usize = 16 << 10;
/// Bytes that may wait to be sent; what is told beyond that is not told.
const MAX_UNSENT: usize = 64 << 10;

/// Where a chunk that was wanted stands.
#[derive(Debug, Clone, Copy)]
enum Want {
    Waits(Instant),
    Answered(Instant),
}

/// What a request that lacks a chunk is to do.
#[derive(Debug)]
pub enum Verdict {
    /// Wait for [`ChunkClient::proceed`].
    Wait,
    /// Fail: it has waited long enough.
    TooLate,
    /// Fail: the other end says that the chunk is here, or that there is none such.
    Answered,
}

/// A stream that is connected.
struct Link {
    stream: UnixStream,
    unsent: Vec<u8>,
    /// The beginning of an arrival.
    partly: Vec<u8>,
}

/// See the module.
pub struct ChunkClient {
    socket: PathBuf,
    patience: Duration,
    epoll: OwnedFd,
    timer: OwnedFd,
    ticks: bool,
    link: Option<Link>,
    /// No connection is tried before.
    again: Option<Instant>,
    wants: BTreeMap<u64, Want>,
    /// Chunks that the other end knows to have been read.
    noted: HashSet<u64>,
    opened: Instant,
}

impl ChunkClient {
    /// A client of `source`, which is not connected to yet.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn open(source: &ChunkSource) -> io::Result<Self> {
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(Self {
            socket: PathBuf::from(&source.socket),
            patience: Duration::from_secs(source.wait_seconds.max(1).into()),
            epoll,
            timer,
            ticks: false,
            link: None,
            again: None,
            wants: BTreeMap::new(),
            noted: HashSet::new(),
            opened: Instant::now(),
        })
    }

    /// Readable when there is something for [`ChunkClient::proceed`] to do.
    pub fn progress(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// How long a request waits.
    pub const fn patience(&self) -> Duration {
        self.patience
    }

    /// A request cannot go on without chunk `number`, which is asked for unless that was done already.
    pub fn want(&mut self, number: u64) -> Verdict {
        let now = Instant::now();
        match self.wants.get(&number) {
            Some(Want::Waits(since)) if now - *since < self.patience => return Verdict::Wait,
            Some(Want::Waits(since)) if now - *since < self.patience + LINGER => return Verdict::TooLate,
            Some(Want::Answered(at)) if now - *at < LINGER => return Verdict::Answered,
            _ => {}
        }
        if self.waiting() < MAX_WANTED {
            self.wants.insert(number, Want::Waits(now));
            self.noted.insert(number);
            // A new connection asks for all that is wanted.
            if !self.connect(now) {
                self.say(Note::Wants(number));
            }
        }
        self.set_ticks();
        Verdict::Wait
    }

    /// Chunk `number` was read from the store.
    pub fn was_read(&mut self, number: u64) {
        let now = Instant::now();
        if now - self.opened < Duration::from_secs(NOTED_SECONDS)
            && self.noted.len() < MAX_NOTED
            && self.noted.insert(number)
        {
            self.connect(now);
            self.say(Note::Read(number));
            self.set_ticks();
        }
    }

    /// Does what there is to do without waiting. True if requests that wait may fare better, or worse, now.
    pub fn proceed(&mut self) -> bool {
        let now = Instant::now();
        // There is something to be read, or there is not.
        let _ticked = rustix::io::read(&self.timer, &mut [0; 8]);
        let arrived = self.receive(now);
        self.connect(now);
        self.send();
        let mut late = false;
        self.wants.retain(|_, want| match want {
            Want::Waits(since) => {
                let waited = now - *since;
                late |= waited >= self.patience;
                waited < self.patience + LINGER
            }
            Want::Answered(at) => now - *at < LINGER,
        });
        self.set_ticks();
        arrived || late
    }

    fn waiting(&self) -> usize {
        self.wants.values().filter(|want| matches!(want, Want::Waits(_))).count()
    }

    /// Connects if there is no connection and it is time to try. True for a new one, over which all that is wanted was
    /// asked for.
    fn connect(&mut self, now: Instant) -> bool {
        if self.link.is_some() || self.again.is_some_and(|again| now < again) {
            return false;
        }
        self.again = Some(now + TICK);
        let Ok(stream) = self.try_connect() else { return false };
        self.link = Some(Link { stream, unsent: Vec::new(), partly: Vec::new() });
        let wanted: Vec<u64> =
            self.wants.iter().filter(|(_, want)| matches!(want, Want::Waits(_))).map(|(number, _)| *number).collect();
        wanted.into_iter().for_each(|number| self.say(Note::Wants(number)));
        true
    }

    fn try_connect(&self) -> io::Result<UnixStream> {
        // Not by the standard library, whose way waits while the other end has too much to do.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &SocketAddrUnix::new(&self.socket)?)?;
        epoll::add(&self.epoll, &fd, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
        Ok(fd.into())
    }

    fn say(&mut self, note: Note) {
        let Some(link) = &mut self.link else { return };
        let wanted = matches!(note, Note::Wants(_));
        // What is wanted is bounded by itself.
        if wanted || link.unsent.len() < MAX_UNSENT {
            link.unsent.extend_from_slice(&note.encode());
        }
        self.send();
    }

    fn send(&mut self) {
        let Some(link) = &mut self.link else { return };
        while !link.unsent.is_empty() {
            match link.stream.write(&link.unsent) {
                Ok(sent) if sent > 0 => drop(link.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Closing it takes it out of the epoll, too.
                _ => return self.link = None,
            }
        }
    }

    /// Takes what has arrived. True if there was something that somebody waits for.
    fn receive(&mut self, now: Instant) -> bool {
        let mut arrived = false;
        let mut buffer = [0; Arrival::LEN * MAX_WANTED];
        while let Some(link) = &mut self.link {
            match link.stream.read(&mut buffer) {
                Ok(count) if count > 0 => link.partly.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return arrived,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                _ => {
                    self.link = None;
                    // At once: it may be back already.
                    self.again = None;
                    return arrived;
                }
            }
            let (whole, rest) = link.partly.as_chunks();
            let whole: Vec<_> = whole.iter().filter_map(|bytes| Arrival::parse(*bytes)).collect();
            link.partly = rest.to_vec();
            for arrival in whole {
                let (Arrival::Here(number) | Arrival::Refused(number)) = arrival;
                // What nobody waits for any more, or never did, is no news.
                if let Some(want @ Want::Waits(_)) = self.wants.get_mut(&number) {
                    *want = Want::Answered(now);
                    arrived = true;
                }
            }
        }
        arrived
    }

    /// The timer runs while somebody waits, or something could not be sent.
    fn set_ticks(&mut self) {
        let unsent = self.link.as_ref().is_some_and(|link| !link.unsent.is_empty());
        let ticks = unsent || !self.wants.is_empty();
        if ticks == self.ticks {
            return;
        }
        let every = if ticks { TICK } else { Duration::ZERO };
        let every = Timespec { tv_sec: every.as_secs() as i64, tv_nsec: every.subsec_nanos().into() };
        let setting = Itimerspec { it_interval: every, it_value: every };
        // Cannot fail: the descriptor is a timer, and the times are such.
        if rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting).is_ok() {
            self.ticks = ticks;
        }
    }
}

#[cfg(test)]
mod tests;
