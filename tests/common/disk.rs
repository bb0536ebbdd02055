//! Disks that a test makes: small ones that fill up, and failing ones.
#![allow(dead_code)] // each test uses its part

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a command; its stderr is the error.
pub fn sh(command: &str, args: &[&str]) -> io::Result<String> {
    let o = Command::new(command).args(args).output()?;
    if !o.status.success() {
        return Err(io::Error::other(format!("{command}: {}", String::from_utf8_lossy(&o.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&o.stdout).trim().to_string())
}

/// A mounted file system; unmounted when dropped.
pub struct Mount {
    folder: tempfile::TempDir,
}

impl Mount {
    /// Mounts with these arguments of `mount`. An error where this process may not: not root, or in a container.
    pub fn new(args: &[&str]) -> io::Result<Self> {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let at = folder.path().to_str().expect("a UTF-8 path");
        sh("mount", &[args, &[at]].concat())?;
        Ok(Mount { folder })
    }

    /// A file system in memory that holds so many bytes.
    pub fn tmpfs(bytes: u64) -> io::Result<Self> {
        Self::new(&["-t", "tmpfs", "-o", &format!("size={bytes}"), "oncall-test"])
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file on it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The names of the files on it, in order.
    pub fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.path()).expect("a folder");
        let mut names: Vec<String> =
            names.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Fills it, but for so many bytes, with a file called `filler`.
    pub fn fill_but(&self, free: u64) {
        let disk = rustix::fs::statvfs(self.path()).expect("a file system");
        let n = (disk.f_bavail * disk.f_frsize).saturating_sub(free);
        std::fs::write(self.file("filler"), vec![0; n as usize]).expect("as much as is free");
    }

    /// Makes room again.
    pub fn make_room(&self) {
        std::fs::remove_file(self.file("filler")).expect("it was filled");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open keeps it, and the folder can go.
        let _ = sh("umount", &["-l", self.path().to_str().unwrap_or_default()]);
    }
}

/// A real block device with a file system and one file on it, which can be made to fail and to stall: a loop device over a file
/// that is cut short (reads behind its end are the device's I/O errors) and made whole again.
pub struct FailingDisk {
    mount: Mount,
    device: Loop,
    backing: PathBuf,
    good: Vec<u8>,
}

/// A loop device; given back when dropped.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = sh("losetup", &["-d", &self.0]);
    }
}

impl FailingDisk {
    /// A disk with a copy of a file. An error where this process may not make one.
    pub fn with(file: &Path, dir: &Path) -> io::Result<Self> {
        let backing = dir.join("backing");
        let n = std::fs::metadata(file)?.len() * 2 + (8 << 20);
        std::fs::File::create(&backing)?.set_len(n)?;
        let path = backing.to_str().expect("a UTF-8 path");
        // No journal: it would have to be written to a disk that fails.
        sh("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", path])?;
        let device = Loop(sh("losetup", &["-f", "--show", path])?);
        let mount = Mount::new(&[&device.0])?;
        std::fs::copy(file, mount.file("model.gguf"))?;
        sh("mount", &["-o", "remount,ro", mount.path().to_str().unwrap_or_default()])?;
        let good = std::fs::read(&backing)?;
        Ok(FailingDisk { mount, device, backing, good })
    }

    /// The file.
    pub fn model(&self) -> PathBuf {
        self.mount.file("model.gguf")
    }

    /// Takes the file out of the page cache but for a range of it, so that the disk is asked for the rest.
    pub fn forget_all_but(&self, kept: std::ops::Range<u64>) {
        use rustix::fs::{Advice, fadvise};
        let file = std::fs::File::open(self.model()).expect("it's there");
        fadvise(&file, 0, None, Advice::DontNeed).expect("a file's pages can be dropped");
        fadvise(&file, 0, None, Advice::Random).expect("nothing more is read than asked");
        let mut range = vec![0; (kept.end - kept.start) as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut range, kept.start).expect("the disk is well");
    }

    /// From now on every read of the device is an I/O error.
    pub fn fail(&self) {
        std::fs::OpenOptions::new()
            .write(true)
            .open(&self.backing)
            .and_then(|f| f.set_len(4096))
            .expect("it can be cut");
    }

    /// Makes it well again.
    pub fn heal(&self) {
        // Not made anew: the device holds on to the file itself.
        let file = std::fs::OpenOptions::new().write(true).open(&self.backing).expect("it's there");
        std::os::unix::fs::FileExt::write_all_at(&file, &self.good, 0).expect("it can be written");
    }

    /// Lets next to nothing through, or everything again. An error where there's no control group of version 1 for it.
    pub fn stall(&self, stalled: bool) -> io::Result<()> {
        let name = Path::new(&self.device.0).file_name().unwrap_or_default();
        let number = std::fs::read_to_string(Path::new("/sys/block").join(name).join("dev"))?;
        let rate = if stalled { 1 } else { 0 };
        std::fs::write("/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device", format!("{} {rate}", number.trim()))
    }
}
