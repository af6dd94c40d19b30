-- Which file of the state directory has the secrets of a submission. Their values are in no table.

CREATE TABLE secrets (
    number INTEGER PRIMARY KEY REFERENCES submissions (number),
    file   TEXT    NOT NULL  -- its name, until all jobs of the submission have ended
) STRICT;
