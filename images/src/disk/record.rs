//! The names and files in which a shared disk's lease is written down. What they are for is said in `lease.rs`.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::fork;
use super::lease::{LeaseError, bad, io_at, is_name, is_period};
use crate::store::{Locked, sync_dir};

/// The version of `holder.{epoch}` that this program writes and reads.
pub(super) const SCHEMA: u32 = 1;

/// A record is a few hundred bytes.
const MAX_RECORD: u64 = 4096;

/// A directory that is read while a file in it is renamed may show both names or none; the next reading is another.
const READINGS: u32 = 20;

/// What the lease file's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) epoch: u64,
    /// How often the holder has renewed it; `None` when there is no holder.
    pub(super) count: Option<u64>,
}

impl Token {
    pub(super) fn path(self, dir: &Path) -> PathBuf {
        match self.count {
            Some(count) => dir.join(format!("lease.{}.{count}", self.epoch)),
            None => dir.join(format!("lease.{}.free", self.epoch)),
        }
    }

    /// `rest` is the name after `lease.`.
    pub(super) fn parse(rest: &str) -> Option<Self> {
        let (epoch, count) = rest.split_once('.')?;
        let count = if count == "free" { None } else { Some(number(count)?) };
        Some(Self { epoch: number(epoch)?, count })
    }

    /// What the directory says now.
    pub(super) fn look(dir: &Path) -> Result<Self, LeaseError> {
        let mut cause = String::new();
        for _ in 0..READINGS {
            let mut found = Vec::new();
            for name in names(dir)? {
                if let Some(rest) = name.strip_prefix("lease.") {
                    let token = Self::parse(rest);
                    found.push(token.ok_or_else(|| bad(&dir.join(&name), "a lease has no such name"))?);
                }
            }
            match found[..] {
                [token] => return Ok(token),
                [] => cause = "the file lease.… is gone".to_owned(),
                _ => cause = format!("it has {} files lease.… and should have one", found.len()),
            }
            thread::yield_now();
        }
        Err(bad(dir, cause))
    }
}

/// A number as we write it: digits without a leading zero.
pub(super) fn number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// Names in `dir`; those that are no UTF-8 are not ours.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, LeaseError> {
    let entries = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(io_at("list", dir))?;
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// `holder.{epoch}`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) schema: u32,
    pub(super) holder: String,
    /// Seconds since 1970 by the holder's clock: for people.
    pub(super) since: u64,
    pub(super) period_ms: u64,
    /// The holder has this file locked (`flock`) for as long as it lives, which its own host can see.
    pub(super) locked: bool,
    /// Files of this epoch have to be made before anybody writes: those before may be in somebody's hands.
    pub(super) forks: bool,
}

impl Record {
    pub(super) fn path(dir: &Path, epoch: u64) -> PathBuf {
        dir.join(format!("holder.{epoch}"))
    }

    /// `None` where the holder has not got so far.
    pub(super) fn read(dir: &Path, epoch: u64) -> Result<Option<Self>, LeaseError> {
        let path = Self::path(dir, epoch);
        let mut bytes = Vec::new();
        match fork::no_links().read(true).open(&path).and_then(|file| file.take(MAX_RECORD).read_to_end(&mut bytes)) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_at("read", &path)(e)),
        }
        let record: Self = serde_json::from_slice(&bytes).map_err(|e| bad(&path, e.to_string()))?;
        if record.schema != SCHEMA || !is_name(&record.holder) || !is_period(record.period()) {
            return Err(bad(&path, "schema, holder or period are not what they can be"));
        }
        Ok(Some(record))
    }

    /// Makes this the record of `epoch`. It is locked from before it has its name.
    pub(super) fn publish(&mut self, dir: &Path, epoch: u64) -> Result<Option<Locked>, LeaseError> {
        let path = Self::path(dir, epoch);
        let draft = dir.join(format!("holder.{epoch}.tmp"));
        let opened = fork::no_links().write(true).create(true).truncate(true).open(&draft);
        let mut file = opened.map_err(io_at("create", &draft))?;
        // A file system without locks only makes a restart on the same host as slow as one on another.
        let lock = file.try_clone().and_then(|file| Locked::take(file, FlockOperation::NonBlockingLockExclusive));
        let lock = lock.unwrap_or_default();
        self.locked = lock.is_some();
        let bytes = serde_json::to_vec(self).map_err(|e| bad(&path, e.to_string()))?;
        file.write_all(&bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(io_at("write", &path))?;
        sync_dir(dir)?;
        Ok(lock)
    }

    pub(super) const fn period(&self) -> Duration {
        Duration::from_millis(self.period_ms)
    }

    /// Locks the record of `epoch`, which works when its holder was of this host and is dead.
    pub(super) fn lock_of_dead(dir: &Path, epoch: u64) -> Option<Locked> {
        // NFS locks exclusively only what is open for writing.
        let file = fork::no_links().read(true).write(true).open(Self::path(dir, epoch)).ok()?;
        Locked::take(file, FlockOperation::NonBlockingLockExclusive).ok()?
    }
}

/// Who has the lease, as far as it is known, and since when.
pub(super) fn who(record: Option<&Record>) -> (String, String) {
    match record {
        Some(record) => (record.holder.clone(), utc(record.since)),
        None => ("a node that has not said its name".to_owned(), "a moment ago".to_owned()),
    }
}

/// A time in UTC as people write it.
pub(super) fn utc(since_1970: u64) -> String {
    // Far enough for anybody; a record may say anything.
    let seconds = since_1970.min(253_402_300_799);
    let (mut days, of_day) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 0;
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year}-{:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", month + 1, days + 1)
}
