# The scripts with their pinned packages. Not built by the project's tests; docs/elsewhere.md says how to use it.
FROM python:3.11
WORKDIR /tweetdora
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "train.py", "--help"]
