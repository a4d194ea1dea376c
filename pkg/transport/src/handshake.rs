// SPDX-License-Identifier: Apache-2.0
//! The first bytes of the control connection.
//!
//! The guest dials and speaks first (a vsock daemon loses what the host sends
//! before): READY with its boot times. The host answers with the token that
//! every later connection presents. Then the connection carries HTTP/2, with
//! the host as the client.

use std::time::Duration;

use podhull_types::{Deadline, Token};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::TransportError;
use crate::transport::VsockTransport;

const READY: &[u8; 8] = b"PHREADY1";
const WELCOME: &[u8; 8] = b"PHTOKEN1";

/// How long the guest's own part of the boot took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestTimes {
    /// From the kernel's first instruction to the agent's `main`.
    pub kernel_to_agent: Duration,
    /// From there to READY.
    pub agent_to_ready: Duration,
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The guest's side: says READY and receives the token.
///
/// # Errors
/// [`TransportError::ForeignHost`] if the peer is not a podhull host.
pub async fn announce(
    transport: &VsockTransport,
    times: GuestTimes,
    by: Deadline,
) -> Result<Token, TransportError> {
    let mut io = transport.io()?;
    let exchange = async {
        let mut ready = Vec::with_capacity(24);
        ready.extend_from_slice(READY);
        ready.extend_from_slice(&micros(times.kernel_to_agent).to_le_bytes());
        ready.extend_from_slice(&micros(times.agent_to_ready).to_le_bytes());
        io.write_all(&ready)
            .await
            .map_err(TransportError::io("send READY"))?;
        let mut magic = [0; WELCOME.len()];
        io.read_exact(&mut magic)
            .await
            .map_err(TransportError::io("receive the token"))?;
        if magic != *WELCOME {
            return Err(TransportError::ForeignHost);
        }
        let mut token = [0; Token::LEN];
        io.read_exact(&mut token)
            .await
            .map_err(TransportError::io("receive the token"))?;
        Ok(Token::from_bytes(token))
    };
    by.run(exchange)
        .await
        .map_err(TransportError::deadline("announce the guest"))?
}

/// The host's side: receives READY and hands out the token.
///
/// # Errors
/// [`TransportError::ForeignAgent`] if the peer is not a podhull agent.
pub async fn welcome(
    transport: &VsockTransport,
    token: &Token,
    by: Deadline,
) -> Result<GuestTimes, TransportError> {
    let mut io = transport.io()?;
    let exchange = async {
        let mut magic = [0; READY.len()];
        io.read_exact(&mut magic)
            .await
            .map_err(TransportError::io("receive READY"))?;
        if magic != *READY {
            return Err(TransportError::ForeignAgent);
        }
        let mut next = async || {
            io.read_u64_le()
                .await
                .map(Duration::from_micros)
                .map_err(TransportError::io("receive READY"))
        };
        let times = GuestTimes {
            kernel_to_agent: next().await?,
            agent_to_ready: next().await?,
        };
        let mut answer = Vec::with_capacity(WELCOME.len() + Token::LEN);
        answer.extend_from_slice(WELCOME);
        answer.extend_from_slice(token.expose());
        io.write_all(&answer)
            .await
            .map_err(TransportError::io("send the token"))?;
        Ok(times)
    };
    by.run(exchange)
        .await
        .map_err(TransportError::deadline("wait for READY"))?
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use podhull_types::VsockPort;

    use super::*;
    use crate::lease::{Holder, HolderKind, LeaseSet};
    use crate::transport::Peer;

    fn pair() -> (VsockTransport, VsockTransport) {
        let (a, b) = UnixStream::pair().unwrap();
        let leases = LeaseSet::new("vm");
        let adopt = |end: UnixStream| {
            let lease = leases
                .issue(Holder::new(HolderKind::Control, "test"))
                .unwrap();
            VsockTransport::adopt(end.into(), Peer::Guest(VsockPort::READY), lease).unwrap()
        };
        (adopt(a), adopt(b))
    }

    fn times() -> GuestTimes {
        GuestTimes {
            kernel_to_agent: Duration::from_micros(447_001),
            agent_to_ready: Duration::from_micros(12),
        }
    }

    #[tokio::test]
    async fn both_sides_agree_and_no_byte_is_lost() {
        let (host, guest) = pair();
        let by = Deadline::after(Duration::from_secs(5));
        let token = Token::from_bytes([9; 32]);
        let (seen, received) =
            tokio::join!(welcome(&host, &token, by), announce(&guest, times(), by));
        assert_eq!(seen.unwrap(), times());
        assert!(received.unwrap().matches(&token));
        host.io().unwrap().write_all(b"PRI").await.unwrap();
        let mut first = [0; 3];
        guest.io().unwrap().read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"PRI");
    }

    #[tokio::test]
    async fn a_stranger_is_refused() {
        let (host, guest) = pair();
        guest.io().unwrap().write_all(&[0; 24]).await.unwrap();
        let by = Deadline::after(Duration::from_secs(5));
        let error = welcome(&host, &Token::from_bytes([9; 32]), by)
            .await
            .unwrap_err();
        assert!(matches!(error, TransportError::ForeignAgent));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_at_the_deadline() {
        let (host, _guest) = pair();
        let by = Deadline::after(Duration::from_secs(5));
        let error = welcome(&host, &Token::from_bytes([9; 32]), by)
            .await
            .unwrap_err();
        assert!(matches!(error, TransportError::Deadline { .. }));
    }
}
