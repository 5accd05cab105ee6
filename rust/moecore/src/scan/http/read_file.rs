//! A small file as a whole: `config.json` and its like.

use super::fetch::{Answer, Ask, Fetch};
use super::retry::Failure;
use crate::{Error, ErrorKind, Result};

impl Fetch<'_> {
    /// The file's bytes, `cap` at most; `None` when the repo has no such file.
    pub(super) async fn small_file(mut self, cap: u64) -> Result<Option<Vec<u8>>> {
        loop {
            match self.try_small_file(cap).await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(Failure::Missing(_)) => return Ok(None),
                Err(failure) => self.recover(failure).await?,
            }
        }
    }

    async fn try_small_file(&mut self, cap: u64) -> Result<Vec<u8>, Failure> {
        let mut answer = self.attempt(&Ask::Whole).await?;
        if answer.status() != 200 {
            let code = answer.status().as_u16();
            return Err(answer.protocol(format_args!("HTTP {code} for a request without a range")).into());
        }
        answer.check_plain()?;
        let announced = answer.response.content_length();
        if announced.is_some_and(|len| len > cap) {
            return Err(too_large(cap).into());
        }
        let deadline = self.deadline(announced.unwrap_or(cap));
        let Ok(body) = tokio::time::timeout(deadline, self.body(&mut answer, cap)).await else {
            return Err(answer.broken("sends too slowly"));
        };
        body
    }

    async fn body(&mut self, answer: &mut Answer<'_>, cap: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        while self.append(answer, &mut bytes, cap).await? {
            if answer.surplus > 0 {
                return Err(too_large(cap).into());
            }
        }
        Ok(bytes)
    }
}

fn too_large(cap: u64) -> Error {
    Error::new(ErrorKind::InvalidConfig, format!("the file is larger than {cap} bytes, which no file of its kind is"))
}
