"""The exposure ledger: what left each client, one line a reply, and one row a value in the table of a finished run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from fedmerge.files import append_line, read_lines, write_table
from fedmerge.runs.exposure import TOO_MUCH
from sim.app.messages import records
from sim.app.server.questions import Question

LINES_FILE = "exposure.jsonl"
TABLE_FILE = "exposure.parquet"
UNSIGNED: Mapping[str, str] = {"sha256": "", "signed_by": "", "signature": ""}


@dataclass(frozen=True)
class Ledger:
    """The ledger in a run folder."""

    folder: Path

    def add(
        self,
        name: str,
        question: Question,
        content: RecordDict,
        *,
        too_large: bool = False,
        late: bool = False,
        signed: Mapping[str, str] = UNSIGNED,
    ) -> None:
        """Add a reply.

        Args:
            name: domain or node that sent it.
            question: that it answers.
            content: of the reply.
            too_large: True if it exceeds the limit; then its size alone is written.
            late: True if it came after its time and was dropped.
            signed: hash, signer and signature.

        Raises:
            RunDirError: the file cannot be written.
        """
        if too_large:
            rows = [{"name": TOO_MUCH, "dtype": "", "shape": "", "size_bytes": records.size_bytes(content)}]
        else:
            rows = list(records.contents(content))
        entry = {
            "domain": name,
            "message": question.message_type,
            "split": question.split,
            "noise": question.noise,
            "late": late,
            **signed,
            "contents": rows,
        }
        append_line(self.folder / LINES_FILE, entry)

    def senders(self, message_type: str) -> list[str]:
        """Return the domains of which a reply to a message of this type arrived, sorted."""
        lines = read_lines(self.folder / LINES_FILE)
        return sorted({str(line["domain"]) for line in lines if line["message"] == message_type})

    def write_table(self) -> None:
        """Write the ledger as a table: one row for each array or value that left a client."""
        replies = sorted(read_lines(self.folder / LINES_FILE), key=lambda reply: str(reply["domain"]))
        if replies:
            rows = (
                {**{key: value for key, value in reply.items() if key != "contents"}, **row}
                for reply in replies
                for row in reply["contents"]
            )
            write_table(self.folder / TABLE_FILE, rows)

    def remove_lines(self) -> None:
        """Remove the lines once the run is finished; the table holds the same."""
        (self.folder / LINES_FILE).unlink(missing_ok=True)
