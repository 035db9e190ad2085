//! Signing images, and asking who signed one.

use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use bedplate_images::Store;
use bedplate_images::trust::{Key, MAX_LEN, TrustError};
use minisign::SecretKeyBox;

use super::Error;
use crate::output::note;

/// Why an image could not be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The file cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// Not a secret key, or the password is wrong.
    #[error(
        "{} cannot be used to sign ({cause}): it has to be a secret key that `minisign -G` made, with its password",
        path.display()
    )]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// The signature, or what is signed.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

fn read(path: &Path) -> Result<String, SignError> {
    let failed = |cause| SignError::File { path: path.to_owned(), cause };
    let mut text = String::new();
    fs::File::open(path).map_err(failed)?.take(MAX_LEN as u64).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// Signs with the secret key in `key`, which is asked for its password where it has one.
pub(super) fn sign(store: &Store, name: &str, key: &Path) -> Result<(), Error> {
    let image = store.resolve(name)?;
    let manifest = store.blob(&image)?;
    let refused = |cause: minisign::PError| SignError::Key { path: key.to_owned(), cause: cause.to_string() };
    let text = read(key)?;
    let plain = SecretKeyBox::from_string(&text).map_err(refused)?.into_unencrypted_secret_key();
    let secret = match plain {
        Ok(secret) => secret,
        // It has a password, which is asked for on the terminal.
        Err(_) => SecretKeyBox::from_string(&text).map_err(refused)?.into_secret_key(None).map_err(refused)?,
    };
    let trusted = format!("bedplate image {image}");
    let signature = minisign::sign(None, &secret, Cursor::new(manifest), Some(&trusted), None).map_err(refused)?;
    keep(store, name, &signature.into_string())
}

/// Takes a signature that somebody made with minisign, of the manifest.
pub(super) fn attach(store: &Store, name: &str, file: &Path) -> Result<(), Error> {
    keep(store, name, &read(file)?)
}

fn keep(store: &Store, name: &str, text: &str) -> Result<(), Error> {
    let image = store.resolve(name)?;
    store.put_signature(&image, text).map_err(SignError::from)?;
    note(&format!("{name} ({image}) is signed; `image push` takes the signature along"));
    Ok(())
}

/// Checks the signature of an image against the public key in `key`.
pub(super) fn verify(store: &Store, name: &str, key: &Path) -> Result<(), Error> {
    let key = Key::read(key).map_err(SignError::from)?;
    store.check_signature(&store.resolve(name)?, None, &key).map_err(SignError::from)?;
    note(&format!("{name} is signed with {}", key.name));
    Ok(())
}
