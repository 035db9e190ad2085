//! The control node's memory: typed tables of JSON rows in one redb file. A [`Change`] is one transaction: all of it is
//! on the disk when [`Store::change`] returns, or none of it.
//!
//! Blocking; async code goes through [`crate::control::Control::change`] and [`crate::control::Control::read`].

pub mod rows;
#[cfg(test)]
mod tests;

use std::fs::OpenOptions;
use std::marker::PhantomData;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use bedplate_api::control::Event;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::records::{Assignment, Failure, Lease, NodeRecord, TierRecord};

/// Version of the rows' layout. A store with another one is refused rather than misread.
const SCHEMA: u32 = 1;

/// Events older than the newest this many are dropped.
pub const KEPT_EVENTS: u64 = 10_000;

/// Physical machines, by zero-padded number.
pub const NODES: Table<NodeRecord> = Table::new("nodes");
/// Tiers, by name.
pub const TIERS: Table<TierRecord> = Table::new("tiers");
/// VMs that hold a slot, by id.
pub const VMS: Table<Assignment> = Table::new("vms");
/// VMs that could not run, by name.
pub const FAILURES: Table<Failure> = Table::new("failures");
/// Addresses on the provisioning network, by MAC.
pub const LEASES: Table<Lease> = Table::new("leases");
/// The log of decisions, by zero-padded number.
pub const EVENTS: Table<Event> = Table::new("events");
const SETTINGS: Table<serde_json::Value> = Table::new("settings");

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be made or opened.
    #[error("cannot open the control node's store {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Cause.
        source: Box<redb::Error>,
    },
    /// Written by a version of this program that this one does not understand.
    #[error("the control node's store has layout {found}, this program reads {SCHEMA}: use the program that wrote it")]
    Schema {
        /// What stands in the file.
        found: serde_json::Value,
    },
    /// A read or a commit failed, mostly for want of room on the disk.
    #[error("the control node's store failed: {0}")]
    Io(Box<redb::Error>),
    /// A row that does not parse: the file was changed by something else.
    #[error("row {key:?} of table {table} in the control node's store is damaged: {source}")]
    Row {
        /// Table.
        table: &'static str,
        /// Key.
        key: String,
        /// Cause.
        source: serde_json::Error,
    },
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Io(Box::new(error.into()))
    }
}

/// A table whose rows are `V`.
pub struct Table<V> {
    name: &'static str,
    rows: PhantomData<fn() -> V>,
}

impl<V> Table<V> {
    const fn new(name: &'static str) -> Self {
        Self { name, rows: PhantomData }
    }

    const fn definition(&self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.name)
    }
}

/// The open store. One process at a time has it.
///
/// After a failed write redb refuses everything until the file is opened again, which takes it back to the last whole
/// transaction. That happens here, so that a disk that was full for a while is no reason to start the process again.
pub struct Store {
    path: PathBuf,
    /// Absent after a failed write. Held for reading during each transaction, so that none is open when it is closed.
    database: RwLock<Option<Database>>,
}

impl Store {
    /// Opens `path`, or makes it, readable by its owner only.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let store = Self { path: path.into(), database: RwLock::new(Some(open(path)?)) };
        store.change(|change| {
            change.make_tables()?;
            match change.setting("schema")? {
                None => change.set("schema", &SCHEMA.into()),
                Some(found) if found == SCHEMA => Ok(()),
                Some(found) => Err(StoreError::Schema { found }),
            }
        })?;
        Ok(store)
    }

    /// Runs `act` over a consistent view of everything.
    pub fn read<T>(&self, act: impl FnOnce(&Snapshot) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.with(|database| act(&Snapshot(database.begin_read()?)))
    }

    /// Runs `act` in one transaction: kept when it returns `Ok`, forgotten otherwise.
    pub fn change<T, E: From<StoreError>>(&self, act: impl FnOnce(&Change) -> Result<T, E>) -> Result<T, E> {
        self.with(|database| {
            let change = Change(database.begin_write().map_err(StoreError::from)?);
            // On an error the transaction is dropped, which aborts it.
            let answer = act(&change)?;
            change.0.commit().map_err(StoreError::from)?;
            Ok(answer)
        })
    }

    fn with<T, E: From<StoreError>>(&self, act: impl FnOnce(&Database) -> Result<T, E>) -> Result<T, E> {
        let mut held = self.database.read().unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            drop(held);
            self.reopen()?;
            held = self.database.read().unwrap_or_else(PoisonError::into_inner);
        }
        // Another thread may have closed it just now.
        let database = held.as_ref().ok_or_else(|| StoreError::from(redb::Error::PreviousIo))?;
        let outcome = act(database);
        let broken = outcome.is_err() && database.begin_write().is_err_and(|error| is_broken(&error.into()));
        drop(held);
        if broken {
            *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        outcome
    }

    fn reopen(&self) -> Result<(), StoreError> {
        let mut held = self.database.write().unwrap_or_else(PoisonError::into_inner);
        if held.is_none() {
            *held = Some(open(&self.path)?);
            tracing::info!("the store {} is open again", self.path.display());
        }
        Ok(())
    }
}

const fn is_broken(error: &redb::Error) -> bool {
    matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo)
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let failed = |source: redb::Error| StoreError::Open { path: path.into(), source: Box::new(source) };
    let mut options = OpenOptions::new();
    // The store holds the nodes' token.
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).map_err(|e| failed(redb::Error::Io(e)))?;
    Database::builder().create_file(file).map_err(|e| failed(e.into()))
}

/// Reading, the same within a [`Snapshot`] and a [`Change`].
pub trait Read {
    /// The row `key`, if there is one.
    fn one<V: DeserializeOwned>(&self, table: &Table<V>, key: &str) -> Result<Option<V>, StoreError>;

    /// All rows with a key greater than `after`, by key.
    fn after<V: DeserializeOwned>(&self, table: &Table<V>, after: &str) -> Result<Vec<V>, StoreError>;

    /// All rows, by key.
    fn all<V: DeserializeOwned>(&self, table: &Table<V>) -> Result<Vec<V>, StoreError> {
        self.after(table, "")
    }
}

/// A consistent view.
pub struct Snapshot(redb::ReadTransaction);

impl Snapshot {
    /// The last `count` rows, by key.
    pub fn latest<V: DeserializeOwned>(&self, table: &Table<V>, count: usize) -> Result<Vec<V>, StoreError> {
        let opened = self.0.open_table(table.definition())?;
        let newest = opened.iter()?.rev().take(count).map(|row| parse(table, row?));
        let mut found = newest.collect::<Result<Vec<V>, StoreError>>()?;
        found.reverse();
        Ok(found)
    }
}

/// A transaction that is being made.
pub struct Change(redb::WriteTransaction);

impl Read for Snapshot {
    fn one<V: DeserializeOwned>(&self, table: &Table<V>, key: &str) -> Result<Option<V>, StoreError> {
        one(&self.0.open_table(table.definition())?, table, key)
    }

    fn after<V: DeserializeOwned>(&self, table: &Table<V>, after: &str) -> Result<Vec<V>, StoreError> {
        rows(&self.0.open_table(table.definition())?, table, after)
    }
}

impl Read for Change {
    fn one<V: DeserializeOwned>(&self, table: &Table<V>, key: &str) -> Result<Option<V>, StoreError> {
        one(&self.0.open_table(table.definition())?, table, key)
    }

    fn after<V: DeserializeOwned>(&self, table: &Table<V>, after: &str) -> Result<Vec<V>, StoreError> {
        rows(&self.0.open_table(table.definition())?, table, after)
    }
}

impl Change {
    /// Writes the row `key`.
    pub fn put<V: Serialize>(&self, table: &Table<V>, key: &str, value: &V) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(value).map_err(|e| row_error(table.name, key, e))?;
        self.0.open_table(table.definition())?.insert(key, bytes.as_slice())?;
        Ok(())
    }

    /// Removes the row `key`; whether it was there.
    pub fn remove<V>(&self, table: &Table<V>, key: &str) -> Result<bool, StoreError> {
        Ok(self.0.open_table(table.definition())?.remove(key)?.is_some())
    }

    fn last_key<V>(&self, table: &Table<V>) -> Result<Option<String>, StoreError> {
        let opened = self.0.open_table(table.definition())?;
        let last = opened.last()?.map(|(key, _)| key.value().to_owned());
        Ok(last)
    }

    /// A read transaction cannot open a table that was never written.
    fn make_tables(&self) -> Result<(), StoreError> {
        for name in ["nodes", "tiers", "vms", "failures", "leases", "events", "settings"] {
            self.0.open_table(Table::<()>::new(name).definition())?;
        }
        Ok(())
    }
}

fn one<V: DeserializeOwned>(
    opened: &impl ReadableTable<&'static str, &'static [u8]>,
    table: &Table<V>,
    key: &str,
) -> Result<Option<V>, StoreError> {
    let Some(bytes) = opened.get(key)? else { return Ok(None) };
    serde_json::from_slice(bytes.value()).map(Some).map_err(|e| row_error(table.name, key, e))
}

fn rows<V: DeserializeOwned>(
    opened: &impl ReadableTable<&'static str, &'static [u8]>,
    table: &Table<V>,
    after: &str,
) -> Result<Vec<V>, StoreError> {
    use std::ops::Bound;
    let range = (Bound::Excluded(after), Bound::Unbounded);
    opened.range::<&str>(range)?.map(|row| parse(table, row?)).collect()
}

type Row<'a> = (redb::AccessGuard<'a, &'static str>, redb::AccessGuard<'a, &'static [u8]>);

fn parse<V: DeserializeOwned>(table: &Table<V>, (key, bytes): Row<'_>) -> Result<V, StoreError> {
    serde_json::from_slice(bytes.value()).map_err(|e| row_error(table.name, key.value(), e))
}

fn row_error(table: &'static str, key: &str, source: serde_json::Error) -> StoreError {
    StoreError::Row { table, key: key.into(), source }
}
