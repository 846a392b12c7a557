//! One file: received, gone on with, checked, and only then given its name.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
    time::Duration,
};

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::header;

use crate::{
    HubError, Result, Watch,
    cache::Repository,
    client::Client,
    listing::{Hash, RemoteFile},
    patience::Patience,
};

/// Bytes after which a connection that is cut has got somewhere.
const PROGRESS_BYTES: u64 = 64 << 10;

const BUFFER_BYTES: usize = 256 << 10;

/// Fetches a file into the cache's blobs.
///
/// # Errors
/// `Mismatch` if it has the wrong hash twice; what [`Client::get`] says; `Io`. Unless its hash is
/// wrong, what was received stays for the next time.
pub fn download(
    client: &Client,
    repository: &Repository,
    file: &RemoteFile,
    watch: &mut dyn Watch,
) -> Result<()> {
    let missing = repository.missing_bytes(file);
    let _lock = repository.lock(file, watch)?;
    // It may be there since the lock was free.
    if !repository.has_blob(file) {
        let mut partial = Partial::open(repository.incomplete(file))?;
        partial.receive(client, file, watch)?;
        if let Err(error) = partial.check(file) {
            watch.pauses(&error, Duration::ZERO);
            partial.truncate()?;
            partial.receive(client, file, watch)?;
            partial.check(file).inspect_err(|_| partial.remove())?;
        }
        partial.finish(repository.blob(file))?;
    }
    watch.received_whole(&file.name, missing);
    Ok(())
}

/// The beginning of a file.
struct Partial {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// Bytes that were there before.
    found: u64,
}

impl Partial {
    /// With what an earlier download has left.
    fn open(path: PathBuf) -> Result<Self> {
        let io = |source| HubError::io(&path, "open", source);
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        Ok(Self { path, file, bytes, found: bytes })
    }

    /// Receives what is missing, over as many connections as it takes.
    fn receive(&mut self, client: &Client, file: &RemoteFile, watch: &mut dyn Watch) -> Result<()> {
        if self.bytes > file.size {
            self.truncate()?;
        }
        let mut patience = Patience::default();
        while self.bytes < file.size {
            let before = self.bytes;
            let received = self.receive_once(client, file, watch);
            if self.bytes >= before + PROGRESS_BYTES {
                patience.renew();
            }
            if let Err(error) = received {
                patience.pause(error, watch)?;
            }
        }
        Ok(())
    }

    /// Receives what is missing, over one connection.
    fn receive_once(
        &mut self,
        client: &Client,
        file: &RemoteFile,
        watch: &mut dyn Watch,
    ) -> Result<()> {
        let response = client.get(&file.path, self.bytes)?;
        let range = response.headers().get(header::CONTENT_RANGE);
        let range = range.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        match response.status().as_u16() {
            206 if range.starts_with(&format!("bytes {}-", self.bytes)) => {}
            // The server sends the whole file.
            200 => self.truncate()?,
            status => {
                self.truncate()?;
                return Err(HubError::Answer {
                    of: format!("`{}`", file.name),
                    found: format!("status {status}, range `{range}`"),
                    expected: "the range that was asked for",
                });
            }
        }
        let mut body = response.into_body().into_reader().take(file.size - self.bytes);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            // However a connection ends, it was cut; it is silent for too long just as well.
            let received = body.read(&mut buffer).unwrap_or(0);
            if received == 0 {
                break;
            }
            let written = self.file.seek(SeekFrom::Start(self.bytes));
            let written = written.and_then(|_| self.file.write_all(&buffer[..received]));
            written.map_err(|source| HubError::io(&self.path, "write", source))?;
            self.bytes += received as u64;
            watch.received(&file.name, self.bytes.saturating_sub(self.found));
        }
        match self.bytes < file.size {
            false => Ok(()),
            true => Err(HubError::Cut {
                file: file.name.clone(),
                found: self.bytes,
                expected: file.size,
            }),
        }
    }

    /// Checks that the bytes are those that the hub lists.
    fn check(&mut self, file: &RemoteFile) -> Result<()> {
        let (kind, found) = match &file.hash {
            Hash::Sha256(_) => ("sha256", self.hash(Sha256::new())),
            Hash::GitBlob(_) => {
                let header = format!("blob {}\0", file.size);
                ("git hash", self.hash(Sha1::new().chain_update(header)))
            }
        };
        let found = found.map_err(|source| HubError::io(&self.path, "read", source))?;
        match found == file.hash.hex() {
            true => Ok(()),
            false => Err(HubError::Mismatch {
                file: file.name.clone(),
                kind,
                found,
                expected: file.hash.hex().to_owned(),
            }),
        }
    }

    /// The hash of the bytes, in hex.
    fn hash<D: Digest>(&mut self, mut digest: D) -> io::Result<String> {
        let mut buffer = vec![0; BUFFER_BYTES];
        self.file.seek(SeekFrom::Start(0))?;
        loop {
            match self.file.read(&mut buffer)? {
                0 => break,
                read => digest.update(&buffer[..read]),
            }
        }
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Begins anew.
    fn truncate(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|source| HubError::io(&self.path, "empty", source))?;
        self.bytes = 0;
        Ok(())
    }

    /// Takes away what is wrong.
    fn remove(&self) {
        // It would be found wrong again.
        let _ = fs::remove_file(&self.path);
    }

    /// Gives the file its name, once it is on the disk.
    fn finish(self, blob: PathBuf) -> Result<()> {
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, &blob))
            .map_err(|source| HubError::io(&blob, "write", source))
    }
}
