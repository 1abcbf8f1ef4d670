# The scripts with their pinned packages. The project's tests do not build it; docs/elsewhere.md shows how to use it.
FROM python:3.11
WORKDIR /tweetdora
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "train.py", "--help"]
